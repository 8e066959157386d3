"""dlmfs: cluster locks as files, on any Linux box, in pure Python."""

__version__ = "0.1.0"
