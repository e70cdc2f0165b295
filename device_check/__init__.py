"""scripts/check_device.sh: does the program work on this machine's device, and how fast? Three parts, one report."""
