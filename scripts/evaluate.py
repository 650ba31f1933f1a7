"""Errors of a trained model or an ensemble on the splits of its dataset.

python scripts/evaluate.py RUN [--split=test] [--weights=best] [--output=predictions.csv] [--plot=parity.png]
    [--exclude-leaked]
"""

from crystalframer_jax.cli.evaluate import evaluate_main

if __name__ == "__main__":
    raise SystemExit(evaluate_main())
