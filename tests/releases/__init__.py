"""dlmfs on other releases of Debian than this machine's: scripts/releases."""
