"""What the commands share: arguments, terminal output, exit statuses, the dry run."""
