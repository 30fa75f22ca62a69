"""How processes are started and how they are asked to stop."""
