"""What both sides share: messages, wire format, sockets, configuration, errors. Imports neither router nor worker."""
