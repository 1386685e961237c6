"""diskmorph: convert disk images, machine packages and container file systems into each other."""
