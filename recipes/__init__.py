"""Programs: each reads flags, builds data, backbone, objective and callbacks, runs the one loop."""
