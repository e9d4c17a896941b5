"""Our engines beside what their users would pick instead, side by side in one run."""
