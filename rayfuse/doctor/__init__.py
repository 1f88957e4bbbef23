"""Check a cluster and a recipe before a run -> findings, each with its remedy.

In: a recipe, and the cluster of RAY_ADDRESS or this machine. Out: a list of findings, empty if all
is well. A Ray task on each node collects its `NodeFacts`; `checks` evaluates them in the driver.
Goes wrong: nothing is raised for a fault of the cluster; it becomes a finding.
"""
