"""THE table of the data sets. A new one is one file beside this and one line here."""

from engine.data.datasets import (
    cocas,
    cuhk03,
    cuhk_pedes,
    llcm,
    ltcc,
    market1501,
    msmt17,
    prcc,
    synth_pedes,
    vc_clothes,
)
from engine.data.datasets._base import DataSet

DATASETS: tuple[DataSet, ...] = (
    market1501.DATASET,
    msmt17.DATASET,
    cuhk03.DATASET,
    prcc.DATASET,
    vc_clothes.DATASET,
    ltcc.DATASET,
    llcm.DATASET,
    cuhk_pedes.DATASET,
    synth_pedes.DATASET,
    cocas.DATASET,
)
