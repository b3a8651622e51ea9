"""The daemon that spawns, watches, limits and ends router and workers. It never touches a token."""
