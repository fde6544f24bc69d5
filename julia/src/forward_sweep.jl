# Forward sensitivities: what the extension with ForwardDiff fills in.

"""
    forward_sweep!(rhs, tableau, steps, arriving, p, pbar, ubar; poll) -> replayed

As `sweep!`, by dual numbers that are carried forward through the accepted steps.
"""
function forward_sweep! end
