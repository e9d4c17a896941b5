"""From the IR to engine directories, one folder per target."""
