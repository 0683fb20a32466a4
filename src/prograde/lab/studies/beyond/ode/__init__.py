"""The parameters of a stiff, oscillating reaction, fitted through an adaptive implicit solver
(diffrax).
"""
