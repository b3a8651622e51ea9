"""The control side: command line, HTTP router and supervisor. Imports neither worker nor mlx."""
