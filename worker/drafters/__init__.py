"""Drafters, one file each behind one protocol, and the controller that decides how far they may go."""
