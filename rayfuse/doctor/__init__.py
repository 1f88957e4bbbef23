"""A cluster and a recipe, looked at before anything is spent -> findings, each with its remedy.

Comes in: a recipe, and the cluster of RAY_ADDRESS or this machine. Goes out: what is wrong; nothing
where all is well. Every node tells `NodeFacts` of itself; what they mean is decided in the driver.
"""
