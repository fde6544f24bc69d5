"""Single steps taken again: dense output, local estimates and the discrete adjoint."""
