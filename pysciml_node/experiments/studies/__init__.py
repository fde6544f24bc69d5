"""Studies of the theory: infinite width, fits of the end of a flow."""
