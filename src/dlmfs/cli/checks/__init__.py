"""What `dlmfs doctor` looks at: this host, its mounts, and a SOURCE that is not mounted."""
