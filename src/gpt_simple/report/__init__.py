"""One HTML file about one run or several: what ``gpt-simple report`` writes. No torch, nothing from elsewhere."""
