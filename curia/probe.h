/*
Probes of frozen features and their metrics: what evaluate computes once it has the features. Doubles throughout; every
sum has one order, so that one thread and many give the same bits.

  dot, dot4                inner products, 8 lanes each
  patient_ranks            a keyed random order of the patients, for splits by patient
  argmax_rows              predictions from scores
  accuracy, balanced_accuracy, majority_class
  auroc, macro_auroc       area under the ROC curve, ties by midranks
  knn_scores               k nearest neighbours by cosine similarity
  logistic_loss            multinomial logistic regression: the loss and its gradient
  logistic_fit             its minimum, by L-BFGS
  logistic_scores          class probabilities
  linear_probe             standardise, choose C on held-out patients, fit, score
  npy_write                a NumPy file of a float32 matrix
*/
#ifndef CURIA_PROBE_H
#define CURIA_PROBE_H

#include <math.h>
#include "file.h"
#include "hash.h"

typedef double vec8 __attribute__((vector_size(64), aligned(8)));

// out[r] = sum_j a[r][j] b[j], j < n, for four rows that share b.
static inline void dot4(const double *const a[4], const double *b, size_t n, double out[4]) {
    vec8 sum[4] = {{0}};
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        vec8 y = *(const vec8 *)(b + j);
        for (int r = 0; r < 4; r++) sum[r] += *(const vec8 *)(a[r] + j) * y;
    }
    for (int r = 0; r < 4; r++) {
        double s = 0;
        for (int lane = 0; lane < 8; lane++) s += sum[r][lane];
        for (size_t t = j; t < n; t++) s += a[r][t] * b[t];
        out[r] = s;
    }
}

static inline double dot(const double *a, const double *b, size_t n) {
    vec8 sum = {0};
    size_t whole = n / 8 * 8;
    for (size_t j = 0; j < whole; j += 8) sum += *(const vec8 *)(a + j) * *(const vec8 *)(b + j);
    double s = 0;
    for (int lane = 0; lane < 8; lane++) s += sum[lane];
    for (size_t j = whole; j < n; j++) s += a[j] * b[j];
    return s;
}

// ---------------------------------------------------------------------------------------------------------------- splits

typedef struct { uint64_t hash, patient; size_t row; } PatientRow;

static inline int patient_order(const void *a, const void *b) {
    const PatientRow *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return (x->patient > y->patient) - (x->patient < y->patient);
}

// rank[i] = the place of row i's patient when the distinct patients are sorted by a hash keyed with the seed; all rows of a
// patient share it. Returns the number of patients. The order depends on the set of patients and the seed alone.
static inline size_t patient_ranks(const uint64_t *patient, size_t n, uint64_t seed, size_t *rank) {
    PatientRow *rows = xmalloc(n * sizeof *rows, "the split by patient");
    for (size_t i = 0; i < n; i++)
        rows[i] = (PatientRow){siphash((SipKey){seed, 0x73706c6974}, &patient[i], sizeof *patient), patient[i], i};
    qsort(rows, n, sizeof *rows, patient_order);
    size_t patients = 0;
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || rows[i].patient != rows[i - 1].patient) patients++;
        rank[rows[i].row] = patients - 1;
    }
    free(rows);
    return patients;
}

// ---------------------------------------------------------------------------------------------------------------- metrics

// predicted[i] = the class with the largest of scores [n, classes]; the first where several are equal.
static inline void argmax_rows(const double *scores, size_t n, int classes, int *predicted) {
    for (size_t i = 0; i < n; i++) {
        const double *row = scores + i * (size_t)classes;
        int best = 0;
        for (int k = 1; k < classes; k++) if (row[k] > row[best]) best = k;
        predicted[i] = best;
    }
}

// Share of the n predictions that equal the label.
static inline double accuracy(const int *predicted, const int *label, size_t n) {
    size_t right = 0;
    for (size_t i = 0; i < n; i++) right += predicted[i] == label[i];
    return (double)right / (double)n;
}

// Mean recall over the classes that occur among the n labels.
static inline double balanced_accuracy(const int *predicted, const int *label, size_t n, int classes) {
    double sum = 0;
    int present = 0;
    for (int k = 0; k < classes; k++) {
        size_t count = 0, right = 0;
        for (size_t i = 0; i < n; i++) {
            count += label[i] == k;
            right += label[i] == k && predicted[i] == k;
        }
        if (count) {
            sum += (double)right / (double)count;
            present++;
        }
    }
    return sum / present;
}

// The most frequent label; the smallest where several are.
static inline int majority_class(const int *label, size_t n, int classes) {
    int best = 0;
    size_t most = 0;
    for (int k = 0; k < classes; k++) {
        size_t count = 0;
        for (size_t i = 0; i < n; i++) count += label[i] == k;
        if (count > most) {
            most = count;
            best = k;
        }
    }
    return best;
}

typedef struct { double score; int positive; } ScoredRow;

static inline int score_order(const void *a, const void *b) {
    double x = ((const ScoredRow *)a)->score, y = ((const ScoredRow *)b)->score;
    return (x > y) - (x < y);
}

// Area under the ROC curve of "is of class k" against scores[i * stride], the probability that a positive scores above a
// negative, equal scores counting half: the rank sum statistic with midranks. NaN where there is no positive or no negative.
static inline double auroc(const double *scores, size_t stride, const int *label, int k, size_t n) {
    ScoredRow *rows = xmalloc(n * sizeof *rows, "the ROC curve");
    size_t positives = 0;
    for (size_t i = 0; i < n; i++) {
        rows[i] = (ScoredRow){scores[i * stride], label[i] == k};
        positives += label[i] == k;
    }
    qsort(rows, n, sizeof *rows, score_order);
    double rank_sum = 0;
    for (size_t start = 0, end; start < n; start = end) {
        size_t tied = 0;
        for (end = start; end < n && rows[end].score == rows[start].score; end++) tied += (size_t)rows[end].positive;
        rank_sum += (double)tied * 0.5 * (double)(start + 1 + end);
    }
    free(rows);
    double p = (double)positives, q = (double)(n - positives);
    return p > 0 && q > 0 ? (rank_sum - 0.5 * p * (p + 1)) / (p * q) : NAN;
}

// Mean one-against-the-rest AUROC of scores [n, classes] over the classes with a positive and a negative; *used is their
// number. NaN where there is none.
static inline double macro_auroc(const double *scores, const int *label, size_t n, int classes, int *used) {
    double sum = 0;
    *used = 0;
    for (int k = 0; k < classes; k++) {
        double area = auroc(scores + k, (size_t)classes, label, k, n);
        if (isnan(area)) continue;
        sum += area;
        ++*used;
    }
    return *used ? sum / *used : NAN;
}

// ------------------------------------------------------------------------------------------------------------ k nearest neighbours

// Rows rows[n] of features [*, dim] as unit vectors [n, dim]; a zero row stays zero. Freed by the caller.
static inline double *unit_rows(const float *features, size_t dim, const size_t *rows, size_t n) {
    double *unit = xmalloc(n * dim * sizeof *unit, "unit features");
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        double *row = unit + i * dim;
        for (size_t j = 0; j < dim; j++) row[j] = features[rows[i] * dim + j];
        double norm = sqrt(dot(row, row, dim));
        for (size_t j = 0; j < dim; j++) row[j] = norm > 0 ? row[j] / norm : 0;
    }
    return unit;
}

// scores [n_test, classes] of the test rows of features [*, dim]: each of the k train rows most similar by cosine votes for
// its label [*] with exp(similarity / temperature); a row of scores sums to 1. Of equally similar rows the earlier counts
// as nearer; k is lowered to n_train. DINO's kNN: k = 20, temperature 0.07 (Caron et al. 2021, facebookresearch/dino eval_knn.py).
static inline void knn_scores(const float *features, size_t dim, const size_t *train, size_t n_train, const size_t *test,
                              size_t n_test, const int *label, int classes, size_t k, double temperature, double *scores) {
    if (k > n_train) k = n_train;
    double *known = unit_rows(features, dim, train, n_train), *asked = unit_rows(features, dim, test, n_test);
    size_t groups = (n_test + 3) / 4;
    double *nearest = xmalloc(groups * 4 * k * sizeof *nearest, "the neighbours");         // similarities, falling
    size_t *neighbour = xmalloc(groups * 4 * k * sizeof *neighbour, "the neighbours");
    #pragma omp parallel for schedule(dynamic)
    for (size_t group = 0; group < groups; group++) {
        const double *row[4];
        size_t found[4] = {0};
        for (size_t r = 0; r < 4; r++) row[r] = asked + (4 * group + r < n_test ? 4 * group + r : n_test - 1) * dim;
        for (size_t i = 0; i < n_train; i++) {
            double similarity[4];
            dot4(row, known + i * dim, dim, similarity);
            for (size_t r = 0; r < 4; r++) {
                double *best = nearest + (4 * group + r) * k;
                size_t *who = neighbour + (4 * group + r) * k, at = found[r];
                if (at == k && !(similarity[r] > best[k - 1])) continue;
                if (at < k) found[r]++;
                else at = k - 1;
                for (; at > 0 && similarity[r] > best[at - 1]; at--) {
                    best[at] = best[at - 1];
                    who[at] = who[at - 1];
                }
                best[at] = similarity[r];
                who[at] = i;
            }
        }
        for (size_t r = 0; r < 4 && 4 * group + r < n_test; r++) {
            double *score = scores + (4 * group + r) * (size_t)classes, sum = 0;
            for (int c = 0; c < classes; c++) score[c] = 0;
            for (size_t j = 0; j < k; j++) {
                double weight = exp(nearest[(4 * group + r) * k + j] / temperature);
                score[label[train[neighbour[(4 * group + r) * k + j]]]] += weight;
                sum += weight;
            }
            for (int c = 0; c < classes; c++) score[c] /= sum;
        }
    }
    free(known);
    free(asked);
    free(nearest);
    free(neighbour);
}

// ------------------------------------------------------------------------------------------------------------- logistic regression

// Probabilities p [n, classes] of x [n, dim] under w: weights [classes, dim], then biases [classes].
static inline void logistic_scores(const double *x, size_t n, size_t dim, int classes, const double *w, double *p) {
    const double *bias = w + (size_t)classes * dim;
    #pragma omp parallel for
    for (size_t start = 0; start < n; start += 4) {
        const double *row[4];
        for (size_t r = 0; r < 4; r++) row[r] = x + (start + r < n ? start + r : n - 1) * dim;
        size_t rows = n - start < 4 ? n - start : 4;
        for (int k = 0; k < classes; k++) {
            double logit[4];
            dot4(row, w + (size_t)k * dim, dim, logit);
            for (size_t r = 0; r < rows; r++) p[(start + r) * (size_t)classes + (size_t)k] = logit[r] + bias[k];
        }
        for (size_t r = 0; r < rows; r++) {
            double *q = p + (start + r) * (size_t)classes, most = q[0], sum = 0;
            for (int k = 1; k < classes; k++) most = q[k] > most ? q[k] : most;
            for (int k = 0; k < classes; k++) sum += q[k] = exp(q[k] - most);
            for (int k = 0; k < classes; k++) q[k] /= sum;
        }
    }
}

// Multinomial logistic regression as scikit-learn has it, divided by C n:
//   loss(w) = mean_i -log p_i[label_i] + |weights|^2 / (2 C n), biases without penalty.
// x [n, dim], label [n] in 0..classes-1, w and its gradient as in logistic_scores; p [n, classes] is scratch.
// Operations: 4 n dim classes; x is read twice.
static inline double logistic_loss(const double *x, const int *label, size_t n, size_t dim, int classes, double C, const double *w,
                                   double *p, double *gradient) {
    size_t K = (size_t)classes, weights = K * dim;
    logistic_scores(x, n, dim, classes, w, p);
    double loss = 0, penalty = 1 / (C * (double)n);
    for (size_t i = 0; i < n; i++) {
        loss -= log(fmax(p[i * K + (size_t)label[i]], 1e-300));
        p[i * K + (size_t)label[i]] -= 1;
    }
    enum { COLUMNS = 64 };          // a thread owns a block of columns of every class: no partial sums to add up
    #pragma omp parallel for
    for (size_t left = 0; left < dim; left += COLUMNS) {
        size_t width = dim - left < COLUMNS ? dim - left : COLUMNS, whole = width & ~(size_t)7;
        for (size_t k = 0; k < K; k++) memset(gradient + k * dim + left, 0, width * sizeof *gradient);
        size_t i = 0;
        for (; i + 4 <= n; i += 4) {
            const double *x0 = x + i * dim + left, *x1 = x0 + dim, *x2 = x1 + dim, *x3 = x2 + dim;
            for (size_t k = 0; k < K; k++) {
                double p0 = p[i * K + k], p1 = p[(i + 1) * K + k], p2 = p[(i + 2) * K + k], p3 = p[(i + 3) * K + k];
                double *g = gradient + k * dim + left;
                for (size_t j = 0; j < whole; j += 8)
                    *(vec8 *)(g + j) += p0 * *(const vec8 *)(x0 + j) + p1 * *(const vec8 *)(x1 + j) +
                                        p2 * *(const vec8 *)(x2 + j) + p3 * *(const vec8 *)(x3 + j);
                for (size_t j = whole; j < width; j++) g[j] += p0 * x0[j] + p1 * x1[j] + p2 * x2[j] + p3 * x3[j];
            }
        }
        for (; i < n; i++)
            for (size_t k = 0; k < K; k++)
                for (size_t j = 0; j < width; j++) gradient[k * dim + left + j] += p[i * K + k] * x[i * dim + left + j];
        for (size_t k = 0; k < K; k++)
            for (size_t j = left; j < left + width; j++)
                gradient[k * dim + j] = gradient[k * dim + j] / (double)n + penalty * w[k * dim + j];
    }
    for (size_t k = 0; k < K; k++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += p[i * K + k];
        gradient[weights + k] = sum / (double)n;
    }
    return loss / (double)n + 0.5 * penalty * dot(w, w, weights);
}

typedef struct { double loss, gap; int iterations, converged; } LogisticFit;

// Minimises logistic_loss from w, which it overwrites: L-BFGS (Nocedal and Wright 2006, algorithm 7.5) with 10 pairs, and
// bisection for a step that meets the weak Wolfe conditions (1e-4, 0.9; Lewis and Overton 2013). The penalty makes the loss
// strongly convex in the weights with constant 1 / (C n), and the rarest class gives the biases, which bear no penalty, a
// curvature of the order 1 / n; so |gradient|^2 max(C, 1) n / 2 estimates the distance from the least loss. It stops once
// that is below `gap`, after 1000 iterations, or where rounding leaves no lower point. Two classes have a weight vector
// each, so their C is half of what scikit-learn calls C for the same solution. A class without a row gets the bias
// -infinity, its exact optimum: probability 0.
static inline LogisticFit logistic_fit(const double *x, const int *label, size_t n, size_t dim, int classes, double C, double gap,
                                       double *w) {
    enum { PAIRS = 10, ITERATIONS = 1000, BISECTIONS = 40 };
    size_t size = (size_t)classes * (dim + 1), bias = (size_t)classes * dim;
    double *memory = xmalloc((4 + 2 * PAIRS) * size * sizeof *memory, "L-BFGS");
    double *gradient = memory, *next_gradient = memory + size, *direction = memory + 2 * size, *next = memory + 3 * size;
    double *step = memory + 4 * size, *change = step + PAIRS * size, curvature[PAIRS], alpha[PAIRS];
    double *p = xmalloc(n * (size_t)classes * sizeof *p, "the probabilities");
    for (int k = 0; k < classes; k++) {
        size_t count = 0;
        for (size_t i = 0; i < n; i++) count += label[i] == k;
        if (count == 0) w[bias + (size_t)k] = -INFINITY;
        else if (isinf(w[bias + (size_t)k])) w[bias + (size_t)k] = 0;
    }
    LogisticFit fit = {.loss = logistic_loss(x, label, n, dim, classes, C, w, p, gradient)};
    int pairs = 0, newest = -1;
    for (;; fit.iterations++) {
        double squared = dot(gradient, gradient, size);
        fit.gap = 0.5 * squared * fmax(C, 1) * (double)n;
        fit.converged = fit.gap <= gap;
        if (fit.converged || fit.iterations == ITERATIONS) break;
        for (size_t j = 0; j < size; j++) direction[j] = -gradient[j];
        for (int a = 0; a < pairs; a++) {
            int i = (newest - a + PAIRS) % PAIRS;
            alpha[i] = dot(step + (size_t)i * size, direction, size) / curvature[i];
            for (size_t j = 0; j < size; j++) direction[j] -= alpha[i] * change[(size_t)i * size + j];
        }
        const double *y = change + (size_t)(newest < 0 ? 0 : newest) * size;
        double scale = pairs ? curvature[newest] / dot(y, y, size) : 1 / fmax(1, sqrt(squared));
        for (size_t j = 0; j < size; j++) direction[j] *= scale;
        for (int a = pairs - 1; a >= 0; a--) {
            int i = (newest - a + PAIRS) % PAIRS;
            double beta = dot(change + (size_t)i * size, direction, size) / curvature[i];
            for (size_t j = 0; j < size; j++) direction[j] += (alpha[i] - beta) * step[(size_t)i * size + j];
        }
        double slope = dot(gradient, direction, size), low = 0, high = INFINITY, t = 1, loss = fit.loss;
        int found = 0;
        for (int b = 0; b < BISECTIONS && !found; b++) {
            for (size_t j = 0; j < size; j++) next[j] = w[j] + t * direction[j];
            loss = logistic_loss(x, label, n, dim, classes, C, next, p, next_gradient);
            if (loss > fit.loss + 1e-4 * t * slope + 1e-15 * fabs(fit.loss)) high = t;
            else if (dot(next_gradient, direction, size) < 0.9 * slope) low = t;
            else found = 1;
            if (!found) t = isinf(high) ? 2 * t : 0.5 * (low + high);
        }
        if (!found) break;
        newest = (newest + 1) % PAIRS;
        if (pairs < PAIRS) pairs++;
        double *s = step + (size_t)newest * size, *d = change + (size_t)newest * size;
        for (size_t j = 0; j < size; j++) {
            s[j] = t * direction[j];
            d[j] = next_gradient[j] - gradient[j];
        }
        curvature[newest] = dot(s, d, size);        // positive: the second Wolfe condition
        memcpy(w, next, size * sizeof *w);
        memcpy(gradient, next_gradient, size * sizeof *w);
        fit.loss = loss;
    }
    free(memory);
    free(p);
    return fit;
}

// ---------------------------------------------------------------------------------------------------------------- linear probe

// centre and scale [dim] of rows rows[n] of features [*, dim]: mean and 1 / standard deviation (N); scale 0 for a column
// that is constant over the rows, which leaves it out.
static inline void standard_statistics(const float *features, size_t dim, const size_t *rows, size_t n, double *centre,
                                       double *scale) {
    #pragma omp parallel for
    for (size_t j = 0; j < dim; j++) {
        double sum = 0, squares = 0;
        int constant = 1;
        for (size_t i = 0; i < n; i++) {
            sum += features[rows[i] * dim + j];
            constant &= features[rows[i] * dim + j] == features[rows[0] * dim + j];
        }
        centre[j] = sum / (double)n;
        for (size_t i = 0; i < n; i++) {
            double d = features[rows[i] * dim + j] - centre[j];
            squares += d * d;
        }
        scale[j] = constant ? 0 : 1 / sqrt(squares / (double)n);
    }
}

// (features[rows[i]] - centre) * scale as doubles [n, dim]. Freed by the caller.
static inline double *standard_rows(const float *features, size_t dim, const size_t *rows, size_t n, const double *centre,
                                    const double *scale) {
    double *x = xmalloc((n ? n : 1) * dim * sizeof *x, "standardised features");
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < dim; j++) x[i * dim + j] = (features[rows[i] * dim + j] - centre[j]) * scale[j];
    return x;
}

typedef struct { double C, validation; LogisticFit fit; } LinearProbe;  // validation: accuracy at C on held-out patients, NaN: none

static const double linear_probe_grid[] = {1e-4, 1e-3, 1e-2, 1e-1, 1, 10};
enum { LINEAR_PROBE_GRID = sizeof linear_probe_grid / sizeof *linear_probe_grid, LINEAR_PROBE_FOLDS = 4 };

// scores [n_test, classes]: probabilities of the test rows of features [*, dim] under a logistic regression of the train
// rows, standardised by the train rows' statistics. C is the one of linear_probe_grid with the most right predictions when
// each fold of train patients is held out in turn (the smaller of equals); rank [*] is patient_ranks' of each row, a
// patient's fold is rank mod folds, and there are at most 4 folds, one per patient where patients are fewer. With one
// train patient C is 1. Every fold is standardised by its own statistics; fits start from the next smaller C's.
static inline LinearProbe linear_probe(const float *features, size_t dim, const size_t *train, size_t n_train, const size_t *test,
                                       size_t n_test, const int *label, const size_t *rank, size_t train_patients, int classes,
                                       double *scores) {
    size_t folds = train_patients < LINEAR_PROBE_FOLDS ? train_patients : LINEAR_PROBE_FOLDS;
    size_t most = n_train > n_test ? n_train : n_test, parameters = (size_t)classes * (dim + 1), right[LINEAR_PROBE_GRID] = {0};
    double *centre = xmalloc(dim * sizeof *centre, "the linear probe"), *scale = xmalloc(dim * sizeof *scale, "the linear probe");
    double *w = xmalloc(parameters * sizeof *w, "the linear probe"),
           *p = xmalloc(most * (size_t)classes * sizeof *p, "the linear probe");
    size_t *fit_rows = xmalloc(n_train * sizeof *fit_rows, "the linear probe"),
           *held_rows = xmalloc(n_train * sizeof *held_rows, "the linear probe");
    int *fit_label = xmalloc(n_train * sizeof *fit_label, "the linear probe"),
        *predicted = xmalloc(n_train * sizeof *predicted, "the linear probe");
    for (size_t fold = 0; fold < folds && folds > 1; fold++) {
        size_t n_fit = 0, n_held = 0;
        for (size_t i = 0; i < n_train; i++) {
            if (rank[train[i]] % folds == fold) held_rows[n_held++] = train[i];
            else fit_label[n_fit] = label[train[i]], fit_rows[n_fit++] = train[i];
        }
        standard_statistics(features, dim, fit_rows, n_fit, centre, scale);
        double *x = standard_rows(features, dim, fit_rows, n_fit, centre, scale);
        double *held = standard_rows(features, dim, held_rows, n_held, centre, scale);
        memset(w, 0, parameters * sizeof *w);
        for (int c = 0; c < LINEAR_PROBE_GRID; c++) {
            logistic_fit(x, fit_label, n_fit, dim, classes, linear_probe_grid[c], 1e-6, w);
            logistic_scores(held, n_held, dim, classes, w, p);
            argmax_rows(p, n_held, classes, predicted);
            for (size_t i = 0; i < n_held; i++) right[c] += predicted[i] == label[held_rows[i]];
        }
        free(x);
        free(held);
    }
    LinearProbe probe = {.C = 1, .validation = NAN};
    if (folds > 1) {
        int best = 0;
        for (int c = 1; c < LINEAR_PROBE_GRID; c++) if (right[c] > right[best]) best = c;
        probe.C = linear_probe_grid[best];
        probe.validation = (double)right[best] / (double)n_train;
    }
    for (size_t i = 0; i < n_train; i++) fit_label[i] = label[train[i]];
    standard_statistics(features, dim, train, n_train, centre, scale);
    double *x = standard_rows(features, dim, train, n_train, centre, scale),
           *asked = standard_rows(features, dim, test, n_test, centre, scale);
    memset(w, 0, parameters * sizeof *w);
    probe.fit = logistic_fit(x, fit_label, n_train, dim, classes, probe.C, 1e-9, w);
    logistic_scores(asked, n_test, dim, classes, w, scores);
    free(x); free(asked); free(centre); free(scale); free(w); free(p);
    free(fit_rows); free(held_rows); free(fit_label); free(predicted);
    return probe;
}

// ---------------------------------------------------------------------------------------------------------------- files

// Writes x [rows, cols] to f as a NumPy file, format 1.0, '<f4', C order. `path` goes into the message of a failed write
// (status 1).
static inline void npy_write(FILE *f, const char *path, const float *x, size_t rows, size_t cols) {
    char header[128];
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);       // 118 bytes of text follow: the data begins at byte 128
    int n = snprintf(header + 10, 118, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", rows, cols);
    header[10 + n] = ' ';
    header[127] = '\n';
    file_write(f, path, header, sizeof header);
    file_write(f, path, x, rows * cols * sizeof *x);
}

#endif
