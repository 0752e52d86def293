"""What the pipeline runs on: servers for one machine, an image, Kubernetes."""
