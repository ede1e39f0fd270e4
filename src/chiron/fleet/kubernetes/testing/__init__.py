"""An API server in memory, controllers and a kubelet for tests: ours, and those of whoever runs Chiron."""
