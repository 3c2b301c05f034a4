"""Shared parts of the commands: arguments, terminal output, exit statuses, the dry run."""
