"""Training objectives: modules that turn examples into a loss.

In: a model and examples. Out: tensors to compute (`pieces`), the loss of each (`forward`), and a validation score.
An objective contains its model, so DistributedDataParallel wraps the objective itself.

Every loss is a *sum*; a step divides it by the total weight of the step, over all workers. So the gradient does not
depend on how a step is cut into pieces and divided among workers.

| objective | trains | loss |
|---|---|---|
| `Sft` | generator | negative log-likelihood of the answer's tokens only |
| `Contrastive` | encoder | InfoNCE (van den Oord et al. 2018) over the passages of the whole step |
| `Distillation` | encoder | KL from a teacher's ranking of the query's own passages, plus weighted InfoNCE |
| `QuerySide` | encoder of queries | either, over fixed passage vectors (Izacard et al. 2023, section 3.4) |
| `Reranking` | late-interaction model or cross-encoder | cross-entropy of the positive among its query's own hits |
| `Joint` | generator and encoder of queries | answer likelihood over all candidates (RAG-Sequence, Lewis et al. 2020) |
"""
