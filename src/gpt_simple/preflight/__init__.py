"""What a run of a configuration would find and need, told before it starts. Nothing here changes anything."""
