"""What every room may use: files, versions."""
