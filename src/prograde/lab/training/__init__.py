"""Training: one loop for all studies, trainers, runs that resume, and the search of rates.

- `loop`: steps up to each point of a curve, figures there, early stopping, divergence
- `trainer`: one estimator on one loss, compiled once; `logged`: the same, with a replay log
- `runs`: a run recorded in a store, resumed from its state or its log
- `search`: a learning rate, with the same budget for every method
- `schedules`, `evaluation`: small parts of these
"""
