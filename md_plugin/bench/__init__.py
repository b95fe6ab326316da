"""This project beside hippynn and others: same weights, same structures, same run.

run         `md-plugin bench`: cases, each a process of its own; tables, JSON, PNG
gpu         `md-plugin bench gpu`: the same on a GPU
scaling     `md-plugin scaling`: the page made of the case `ranks`
"""
