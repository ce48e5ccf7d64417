"""From a recipe and a command line to a running job."""
