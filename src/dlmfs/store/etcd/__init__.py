"""The store on an etcd cluster (extra `dlmfs[etcd]`)."""
