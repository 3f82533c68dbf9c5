import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from fastelbo.sklearn import PPCA


@parametrize_with_checks([PPCA(), PPCA(method="em")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
