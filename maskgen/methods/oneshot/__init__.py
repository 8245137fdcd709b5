"""The methods that solve one layer at a time, from its weight and what was seen of its inputs."""
