"""The built-in tasks, one module each with its `TASK`; a new module here is a new task.

The prompts of sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad and drop are those of MeZO
(Malladi et al. 2023, arXiv 2305.17333), so that accuracies compare with the papers that follow its protocol.
"""
