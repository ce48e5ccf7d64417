"""What every room may use: errors, files, versions, the ends of commands."""
