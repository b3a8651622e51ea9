"""The command line `mlxspec`: one file for each group of verbs."""
