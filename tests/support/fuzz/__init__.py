"""Random models, losses and ways to call them, one for each seed, each compared with the oracle.

python -m tests.support.fuzz --seeds 3000      a table of what came of them
python -m tests.support.fuzz --seed 17 -v      the program of one seed, and what came of it

pieces.py: what programs call beside torch; draft.py: a model that is being written; anywhere.py,
sequences.py, images.py: the steps of which models are made; steps.py: how they are strung together;
losses.py: what is made of outputs; case.py: the program of a seed; truth.py: the oracle; check.py:
what is asked of nnj; report.py: what came of many seeds; shrink.py: a shorter program.
"""
