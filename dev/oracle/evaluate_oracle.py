"""evaluate against scikit-learn and, where it is installed, transformers.

  python evaluate_oracle.py ./test_evaluate [./evaluate] [--speed]

Makes problems (uneven classes, ties, a class without a training or test row, constant columns, wide and separable data), lets
`./test_evaluate --case FILE` solve each, and compares: kNN predictions and scores, macro AUROC, balanced accuracy, the loss of
logistic regression at its minimum, and the linear probe. With ./evaluate, its extracted features are compared with those of
transformers (float64) on slices that PyTorch resizes, clips and z-scores. Ends with `N passed, N failed`. --speed times a
larger problem.
"""
import os, struct, subprocess, sys, tempfile, time, warnings
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

passed = failed = 0


def check(good, text):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAILED", text)


def solve(program, x, y, rank, classes, n_train, k, C):
    """Runs the C side; a dict of its output lines."""
    with tempfile.NamedTemporaryFile(delete=False) as f:
        f.write(struct.pack("<5qd", *x.shape, classes, n_train, k, C))
        f.write(x.astype("<f4").tobytes() + y.astype("<i4").tobytes() + rank.astype("<i4").tobytes())
    try:
        text = subprocess.run([program, "--case", f.name], check=True, capture_output=True, text=True).stdout
    finally:
        os.unlink(f.name)
    out = {}
    for line in text.splitlines():
        name, *values = line.split()
        out[name] = np.array([float(v) for v in values]) if len(values) != 1 else float(values[0])
    return out


def macro_auroc(y, scores):
    """Mean one-against-the-rest AUROC over the classes with a positive and a negative."""
    areas = [roc_auc_score(y == k, scores[:, k]) for k in range(scores.shape[1]) if 0 < (y == k).sum() < len(y)]
    return np.mean(areas), len(areas)


def standardise(x, train):
    """As evaluate does: training mean and standard deviation, constant columns left out."""
    x = x.astype(np.float64)
    centre, scale = x[train].mean(0), x[train].std(0)
    constant = (x[train] == x[train][:1]).all(0)
    return (x - centre) / np.where(constant, 1, scale) * ~constant


def fit(x, y, C):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=C, tol=1e-9, max_iter=20000).fit(x, y)


def objective(model, x, y, C):
    """scikit-learn's objective of three classes or more, divided by C n."""
    return log_loss(y, model.predict_proba(x), labels=model.classes_) + (model.coef_ ** 2).sum() / (2 * C * len(y))


def make(rng, n, dim, classes, spread, ties):
    y = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 3.0)))
    y[:classes] = np.arange(classes)
    y[-classes:] = np.arange(classes)
    x = rng.normal(size=(n, dim)) + spread * rng.normal(size=(classes, dim))[y]
    if ties:
        x = np.round(x)
    return x.astype(np.float32), y


def compare(program, title, x, y, classes, n_train, k, C):
    rank = np.arange(len(y)) // 3 % 9
    c = solve(program, x, y, rank, classes, n_train, k, C)
    train, test = slice(0, n_train), slice(n_train, None)
    yt = y[test]
    # kNN. Equal similarities may be ordered otherwise, so the scores are compared where the k-th neighbour is not tied.
    u = x.astype(np.float64)
    norm = np.linalg.norm(u, axis=1, keepdims=True)
    u = u / np.where(norm > 0, norm, 1)
    knn = KNeighborsClassifier(min(k, n_train), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)).fit(u[train], y[train])
    similarity = np.sort(u[test] @ u[train].T, axis=1)[:, ::-1]
    clear = similarity[:, k - 1] - similarity[:, k] > 1e-9 if k < n_train else np.ones(len(yt), bool)
    probability = np.zeros((len(yt), classes))
    probability[:, knn.classes_] = knn.predict_proba(u[test])
    scores = c["knn.scores"].reshape(-1, classes)
    check(np.abs(scores - probability)[clear].max() < 1e-9, f"{title}: kNN scores differ by {np.abs(scores - probability)[clear].max():.3g}")
    top = np.sort(scores, axis=1)
    decided = clear & (top[:, -1] - top[:, -2] > 1e-9)
    check((c["knn.predicted"][decided] == knn.predict(u[test])[decided]).all(), f"{title}: kNN predictions")
    for name in ("knn", "linear"):
        s = c[f"{name}.scores"].reshape(-1, classes)
        predicted = c[f"{name}.predicted"].astype(int)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # predictions of classes without a test row
            balanced = balanced_accuracy_score(yt, predicted)
        area, used = macro_auroc(yt, s)
        check(abs(c[f"{name}.balanced_accuracy"] - balanced) < 1e-12, f"{title}: {name} balanced accuracy")
        check(abs(c[f"{name}.macro_auroc"] - area) < 1e-9 and used == c[f"{name}.used"], f"{title}: {name} macro AUROC")
        if used == classes > 2:
            check(abs(area - roc_auc_score(yt, s / s.sum(1, keepdims=True), multi_class="ovr", average="macro")) < 1e-9, f"{title}: {name} AUROC, multi_class")
    # Logistic regression at a given C, then the probe at the C that evaluate chose.
    z = standardise(x, train)
    seen = np.unique(y[train])
    if len(seen) > 2:
        model = fit(z[train], y[train], C)
        loss = objective(model, z[train], y[train], C)
        check(c["logistic.converged"] and abs(c["logistic.loss"] - loss) < 1e-6 and c["logistic.loss"] < loss + 1e-8,
              f"{title}: logistic loss {c['logistic.loss']:.12g}, scikit-learn {loss:.12g}")
        grid, right = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10], []
        r, folds = rank[train], min(4, rank[train].max() + 1)
        for value in grid:
            hits = 0
            for fold in range(folds):
                inside = np.flatnonzero(r % folds != fold)
                held = np.flatnonzero(r % folds == fold)
                zf = standardise(x[train], inside)
                hits += (fit(zf[inside], y[train][inside], value).predict(zf[held]) == y[train][held]).sum()
            right.append(hits)
        best = max(right)
        check(abs(c["linear.validation"] * n_train - best) <= 1 and right[grid.index(c["linear.C"])] >= best - 1,
              f"{title}: C {c['linear.C']} of {dict(zip(grid, right))}, validation {c['linear.validation'] * n_train:.1f}")
        model = fit(z[train], y[train], c["linear.C"])
        probability = np.zeros((len(yt), classes))
        probability[:, model.classes_] = model.predict_proba(z[test])
        worst = np.abs(probability - c["linear.scores"].reshape(-1, classes)).max()
        check(worst < 1e-3, f"{title}: linear probabilities differ by {worst:.3g}")
    else:
        # Two classes: evaluate penalises both classes' weights, w and -w; scikit-learn has one vector 2w, so its C is twice ours.
        model = fit(z[train], y[train], 2 * C)
        w = model.coef_ / 2
        loss = log_loss(y[train], model.predict_proba(z[train])) + 2 * (w ** 2).sum() / (2 * C * n_train)
        check(c["logistic.converged"] and abs(c["logistic.loss"] - loss) < 1e-6, f"{title}: logistic loss of two classes {c['logistic.loss']:.12g}, {loss:.12g}")


def compare_features(program, evaluate):
    """Extracted features of two small models, with SwiGLU and with registers, within 1e-5 (relative L2) of transformers'."""
    try:
        import torch
        from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    except ImportError as missing:
        print(f"features are not compared: {missing}")
        return
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, layerscale_value=1.0)
    models = {"swiglu": Dinov2Model(Dinov2Config(num_channels=1, use_swiglu_ffn=True, **size)),
              "registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_channels=3, num_register_tokens=3, **size))}
    with tempfile.TemporaryDirectory() as folder:
        shard = f"{folder}/a.shard"
        subprocess.run([program, "--shard", shard], check=True)
        pixels = np.fromfile(shard, "<i2", 60 * 480, offset=128).reshape(60, 24, 20)      # 960 bytes a slice: no zeros between
        values = torch.tensor(2.0 * pixels - 1100)[:, None]
        for name, model in models.items():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            model.eval().save_pretrained(f"{folder}/{name}")
            model.double()
            skip = 1 + getattr(model.config, "num_register_tokens", 0)
            for norm, clip, side in (("slice", 1, 32), ("slice", 0, 48), ("volume", 1, 48), ("volume", 0, 32)):
                subprocess.run([evaluate, "--model", f"{folder}/{name}", "--data", shard, "--extract", f"{folder}/f", "--feature", "cls+mean",
                                "--norm", norm, "--clip-air", str(clip), "--size", str(side)], check=True, capture_output=True)
                x = torch.nn.functional.interpolate(values, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
                if clip:
                    x = x.clamp_min(-1000)
                mean, std = (x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)) if norm == "slice" else ((-890, 150) if clip else (-960, 200))
                x = ((x - mean) / std).repeat(1, model.config.num_channels, 1, 1)
                with torch.no_grad():
                    y = model(pixel_values=x).last_hidden_state
                expected = torch.cat([y[:, 0], y[:, skip:].mean(1)], 1).numpy()
                found = np.load(f"{folder}/f.npy")
                error = np.linalg.norm(found - expected) / np.linalg.norm(expected) if found.shape == expected.shape else np.inf
                check(error < 1e-5, f"features of {name}, norm {norm}, clip {clip}, {side} pixels: relative error {error:.3g}")


def main():
    program, *rest = [os.path.abspath(a) for a in sys.argv[1:] if not a.startswith("--")]
    if rest:
        compare_features(program, rest[0])
    rng = np.random.default_rng(0)
    for dim, classes, n, n_train in ((5, 3, 120, 60), (33, 6, 400, 250), (200, 4, 160, 90), (64, 2, 200, 100)):
        for C in (1e-3, 0.1, 10):
            for ties in (False, True):
                x, y = make(rng, n, dim, classes, 0.4, ties)
                compare(program, f"dim {dim} classes {classes} C {C} ties {ties}", x, y, classes, n_train, 20, C)
    x, y = make(rng, 300, 40, 5, 0.3, False)
    y[:150][y[:150] == 2] = 1           # class 2 has no training row, class 4 no test row
    y[150:][y[150:] == 4] = 0
    compare(program, "missing classes", x, y, 5, 150, 20, 0.1)
    x, y = make(rng, 200, 30, 3, 0.3, False)
    x[:, :7] = 3.3                      # constant columns
    compare(program, "constant columns", x, y, 3, 100, 20, 1.0)
    compare(program, "all features constant", np.full_like(x, 0.7), y, 3, 100, 100, 1.0)
    x, y = make(rng, 200, 300, 5, 4.0, False)
    compare(program, "separable", x, y, 5, 100, 20, 10.0)
    if "--speed" in sys.argv:
        n, dim, classes, n_train = 12000, 768, 10, 6000
        x, y = make(rng, n, dim, classes, 0.1, False)
        c = solve(program, x, y, np.arange(n) // 30 % 200, classes, n_train, 20, 0.01)
        z = standardise(x, slice(0, n_train))
        start = time.time()
        model = LogisticRegression(C=0.01, tol=1e-4, max_iter=1000).fit(z[:n_train], y[:n_train])
        took = time.time() - start
        loss = objective(model, z[:n_train], y[:n_train], 0.01)
        print(f"{n_train} x {dim}, {classes} classes, C=0.01: loss {c['logistic.loss']:.9f} in {c['logistic.seconds']:.2f} s ({c['logistic.iterations']:.0f} iterations); "
              f"scikit-learn, tol 1e-4: {loss:.9f} in {took:.2f} s")
        print(f"the whole linear probe {c['linear.seconds']:.2f} s; kNN of {n - n_train} rows {c['knn.seconds']:.2f} s")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


sys.exit(main())
