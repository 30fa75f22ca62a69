"""What a run of a configuration would find and need, known before it starts. Nothing here changes anything."""
