"""Predict structure files (CIF, POSCAR, extended XYZ) with a trained model or an ensemble.

python scripts/predict.py RUN FILE... [--output=predictions.csv]
"""

from crystalframer_jax.cli.predict import predict_main

if __name__ == "__main__":
    raise SystemExit(predict_main())
