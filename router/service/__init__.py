"""mlxspec as a service of the machine: what launchd or systemd is told, and the commands that tell it."""
