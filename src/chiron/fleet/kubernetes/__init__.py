"""Instances as pods of a Deployment, StatefulSet or LeaderWorkerSet."""
