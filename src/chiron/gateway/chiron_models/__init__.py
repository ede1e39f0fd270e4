"""Models as ``ChironModel`` resources of a Kubernetes namespace: read, followed, and told how they are doing."""
