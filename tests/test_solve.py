import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from hf_sgdr.features.store import FeatureStore
from hf_sgdr.optim.folds import stratified_folds
from hf_sgdr.optim.solve import solve_head

STRENGTHS = [1e-3, 1e-2, 1e-1, 1.0, 10.0]


def features_of(rows, width, classes, seed=0, noise=1.0):
    """Like those of a network: above zero, of very different sizes, classes that overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = rng.normal(size=(classes, width))
    sizes = np.linspace(0.05, 2, width)
    features = np.abs(0.3 * centres[labels] + noise * rng.normal(size=(rows, width))) * sizes
    return torch.from_numpy(features.astype(np.float32)), labels


def probabilities(solution, features):
    return (features @ solution.weight.T + solution.bias).double().softmax(1).numpy()


@pytest.mark.parametrize(("rows", "width", "classes"), [(200, 30, 3), (60, 90, 2), (150, 400, 6), (300, 20, 2)])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_at_one_strength_it_is_scikit_learns_optimum(rows, width, classes, strength):
    features, labels = features_of(rows, width, classes)
    solution = solve_head(features, labels, strengths=[strength])
    other = LogisticRegression(C=strength, max_iter=20_000, tol=1e-8).fit(features.double().numpy(), labels)
    theirs = log_loss(labels, other.predict_proba(features.double().numpy()))
    assert log_loss(labels, probabilities(solution, features)) == pytest.approx(theirs, abs=1e-4)
    np.testing.assert_allclose(probabilities(solution, features), other.predict_proba(features.numpy()), atol=5e-3)
    assert solution.strength == strength


def test_with_the_same_folds_the_choice_is_that_of_logistic_regression_cv():
    features, labels = features_of(180, 40, 3)
    parts = list(StratifiedKFold(5, shuffle=True, random_state=0).split(features, labels))
    solution = solve_head(features, labels, strengths=STRENGTHS, folds=parts)
    other = LogisticRegressionCV(
        Cs=STRENGTHS,
        cv=parts,
        scoring="neg_log_loss",
        max_iter=5000,
        tol=1e-6,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    ).fit(features.double().numpy(), labels)
    assert solution.strength == np.ravel(other.C_)[0]
    held_out = np.zeros((len(labels), 3))
    for train, rows in parts:
        one = LogisticRegression(C=solution.strength, max_iter=5000).fit(
            features[train].double().numpy(), labels[train]
        )
        held_out[rows] = one.predict_proba(features[rows].double().numpy())
    assert solution.cv_loss == pytest.approx(log_loss(labels, held_out), abs=1e-3)
    np.testing.assert_allclose(solution.out_of_fold.exp(), held_out, atol=5e-3)
    assert solution.cv_accuracy == (held_out.argmax(1) == labels).mean()
    losses = -solution.out_of_fold[range(len(labels)), labels]
    assert solution.cv_loss_error == pytest.approx(float(losses.std()) / len(labels) ** 0.5, rel=1e-3)
    assert solution.cv_loss == min(solution.cv_losses)


def test_every_precision_and_place_gives_the_same_head(tmp_path):
    features, labels = features_of(120, 24, 3)
    half = features.half()
    store = FeatureStore({"of": "this test"}, len(half), tmp_path)
    for shard in range(store.num_shards):
        rows = store.shard_rows(shard)
        store.write(shard, half[rows.start : rows.stop])
    solutions = [
        solve_head(given, labels, strengths=[0.1]) for given in (half, half.float(), store.open(), half.bfloat16())
    ]
    for solution in solutions[1:3]:
        torch.testing.assert_close(solution.weight, solutions[0].weight)
    assert solutions[3].weight == pytest.approx(solutions[0].weight, abs=2e-2)


def test_views_of_an_image_are_held_out_together_and_the_plain_one_is_scored():
    plain, labels = features_of(90, 20, 3)
    views = torch.cat([plain, plain + 0.01, plain - 0.01])
    groups = np.tile(np.arange(90), 3)
    solution = solve_head(views, np.tile(labels, 3), groups=groups, strengths=[0.1])
    assert solution.out_of_fold.shape == (90, 3)
    assert solution.cv_loss == pytest.approx(solve_head(plain, labels, strengths=[0.3]).cv_loss, rel=0.05)
    for train, held_out in stratified_folds(np.tile(labels, 3), 5, 42, groups):
        assert not set(groups[train]) & set(groups[held_out])


def test_folds_hold_each_image_out_once_and_spread_each_class():
    labels = np.repeat([0, 1, 2], [50, 23, 4])
    folds = stratified_folds(labels, 5, 42, np.arange(77))
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(77))
    for train, held_out in folds:
        assert not set(train) & set(held_out)
        assert len(held_out) in (15, 16)
        assert np.bincount(labels[held_out], minlength=3)[0] == 10


def test_a_class_with_one_image_is_never_held_out_and_one_without_any_is_the_least_likely():
    features, labels = features_of(60, 15, 2)
    labels = np.where(labels == 1, 3, 0)
    labels[0] = 2  # the only one; of class 1 there is none
    solution = solve_head(features, labels, strengths=[0.1])
    assert solution.out_of_fold[0].isnan().all()
    assert not solution.out_of_fold[1:].isnan().any()
    assert solution.weight.shape == (4, 15)
    assert (probabilities(solution, features).argmin(1) == 1).all()
    assert np.isfinite(solution.cv_loss)


def test_several_labels_an_image_are_problems_of_their_own():
    features, labels = features_of(120, 25, 2)
    other = (features.sum(1) > features.sum(1).median()).long().numpy()
    solution = solve_head(features, np.stack([labels, other], axis=1), strengths=[0.1])
    for column, truth in enumerate((labels, other)):
        alone = LogisticRegression(C=0.1, max_iter=5000).fit(features.double().numpy(), truth)
        np.testing.assert_allclose(solution.weight[column], alone.coef_[0], atol=2e-3)
    assert solution.out_of_fold.shape == (120, 2)


def test_weights_of_rows_count_as_so_many_rows():
    features, labels = features_of(80, 12, 3)
    counts = np.random.default_rng(0).integers(1, 4, 80)
    weighted = solve_head(features, labels, strengths=[0.1], sample_weight=counts)
    rows = np.repeat(np.arange(80), counts)
    repeated = solve_head(features[rows], labels[rows], strengths=[0.1], groups=rows)
    torch.testing.assert_close(weighted.weight, repeated.weight, atol=2e-3, rtol=1e-2)


def test_constant_columns_change_nothing():
    features, labels = features_of(70, 10, 2)
    wider = torch.cat([features, torch.ones(70, 3)], dim=1)
    narrow, wide = (solve_head(given, labels, strengths=[1.0]) for given in (features, wider))
    torch.testing.assert_close(wide.weight[:, :10], narrow.weight, atol=1e-3, rtol=1e-3)
    assert wide.weight[:, 10:].abs().max() < 1e-4


@pytest.mark.parametrize("rows", [700, 60])
def test_few_columns_among_constant_ones_are_solved(rows):
    # As those of a network with dead channels; LAPACK gave up on their Gram matrix.
    features, labels = features_of(rows, 16, 2)
    wide = torch.full((rows, 512), 6.0)
    wide[:, ::32] = features
    narrow, solved = (solve_head(given, labels, strengths=[1.0]) for given in (features, wide))
    torch.testing.assert_close(solved.weight[:, ::32], narrow.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", [400, 40])
def test_a_column_of_another_size_hides_no_other(rows):
    features, labels = features_of(rows, 50, 2)
    features[:, 0] = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    near = solve_head(features, labels, strengths=[0.1])
    far = solve_head(features * torch.tensor([3000.0] + [1.0] * 49), labels, strengths=[0.1])
    torch.testing.assert_close(
        far.weight[:, 1:], near.weight[:, 1:], atol=0.03, rtol=0.03
    )  # the first is penalised less


def test_features_may_be_an_array_or_have_gradients():
    features, labels = features_of(60, 6, 2)
    expected = solve_head(features, labels, strengths=[1.0])
    for given in (features.numpy(), features.clone().requires_grad_()):
        torch.testing.assert_close(solve_head(given, labels, strengths=[1.0]).weight, expected.weight)


def test_a_class_without_rows_may_be_the_last_one():
    features, labels = features_of(60, 6, 3)
    solution = solve_head(features, labels, strengths=[1.0], num_classes=5)
    assert solution.weight.shape == (5, 6)
    assert solution.bias[3:].max() < solution.bias[:3].min()
    assert solution.out_of_fold[:, 3:].isneginf().all()


def test_folds_may_be_masks():
    features, labels = features_of(60, 6, 2)
    mask = np.arange(60) < 20
    as_masks, as_rows = (
        solve_head(features, labels, strengths=[1.0], folds=[(train, held_out), (held_out, train)])
        for train, held_out in ((~mask, mask), (np.flatnonzero(~mask), np.flatnonzero(mask)))
    )
    assert as_masks.cv_loss == as_rows.cv_loss


def test_features_that_are_all_alike_give_the_classes_shares():
    solution = solve_head(torch.ones(40, 5), np.arange(40) % 4 // 3, strengths=[1.0])
    assert solution.cv_loss == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(20, dtype=int)}, "All 20 rows are of class 0: at least two classes are needed."),
        ({"labels": np.arange(19)}, r"labels of shape \(19,\) for 20 rows of features: must be one a row."),
        ({"labels": np.full(20, 0.5)}, "labels are float64: must be class ids"),
        ({"labels": np.arange(20) - 1}, "labels must be class ids >= 0"),
        ({"labels": np.arange(20)}, "No class has two images, so none can be held out"),
        ({"features": torch.full((20, 3), torch.nan)}, "The features are not finite"),
        ({"features": torch.ones(20, 3, 1, 1)}, r"features of shape \(20, 3, 1, 1\): .* as features.flatten\(1\) is"),
        ({"features": np.ones(20)}, r"features of shape \(20,\): must be \(rows, width\)"),
        ({"strengths": [0.0]}, r"strengths=\[0.0\]: must be finite numbers above 0"),
        ({"strengths": []}, r"strengths=\[\]: must be finite numbers above 0, at least one"),
        ({"folds": 1}, "folds=1: must be an integer >= 2"),
        ({"folds": [([0], [-1])]}, r"folds\[0\] trains on 1 rows and holds 1 out: both must be rows"),
        ({"sample_weight": np.zeros(20)}, "sample_weight is 0 for all rows"),
        ({"groups": np.full(20, np.nan)}, r"groups of shape \(20,\) for 20 rows: must be one number a row, no NaN"),
        ({"features": torch.randn(20, 3) * 1e25}, "The features vary by .* in all: scale them nearer to 1"),
        ({"num_classes": 1}, "num_classes=1, but the labels are of 2 classes"),
        ({"folds": [([0], [])]}, r"folds\[0\] trains on 1 rows and holds 0 out"),
        (
            {"folds": [(np.arange(19) < 9, np.arange(19) >= 9)]},
            r"folds has a mask of shape \(19,\) for 20 rows: must be one value a row",
        ),
        ({"groups": np.arange(3)}, r"groups of shape \(3,\) for 20 rows"),
        (
            {"sample_weight": -np.ones(20)},
            r"sample_weight of shape \(20,\) for 20 rows: must be one number >= 0",
        ),
    ],
)
def test_what_cannot_be_solved_is_said_in_one_line(change, message):
    features, labels = features_of(20, 3, 2)
    given = {"features": features, "labels": labels, **change}
    with pytest.raises(ValueError, match=message) as error:
        solve_head(given.pop("features"), given.pop("labels"), **given)
    assert "\n" not in str(error.value)


def test_its_plot_marks_the_chosen_strength():
    features, labels = features_of(60, 10, 2)
    solution = solve_head(features, labels, strengths=STRENGTHS)
    ax = solution.plot()
    assert list(ax.lines[0].get_xdata()) == STRENGTHS
    assert ax.lines[1].get_xdata()[0] == solution.strength
    assert repr(solution).startswith(f"HeadSolution(2 classes, strength={solution.strength:g}, cv_loss=")
