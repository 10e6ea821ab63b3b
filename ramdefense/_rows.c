/* Refined attention, one row of scores after another, in float32: what tiles.py says in words and does without this
   module where there is no compiler. Every pass over a row finds it in the cache.

   Arrays are given by address, contiguous; tiles.py checks them. The random bits are those of torch.Generator on a CPU
   (MT19937, Matsumoto & Nishimura 1998), 16 for an element. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One binary for every x86: the loader picks the widest version that the processor has. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))

enum { STATE = 624, MIDDLE = 397, ROUNDS = 200 };
static const float UNIFORM = 1e-6f; /* as in refinement.py */

/* ------------------------------------------------------------------------------------------------ random bits */

typedef struct {
    uint32_t state[STATE];
    uint32_t made[STATE]; /* in the order in which elements use them */
    int32_t used;         /* halves of `made` */
} Stream;

INLINE uint32_t twist(uint32_t one, uint32_t two, uint32_t far)
{
    uint32_t mixed = (one & 0x80000000u) | (two & 0x7fffffffu);
    return far ^ (mixed >> 1) ^ ((0u - (two & 1u)) & 0x9908b0dfu);
}

VERSIONS static void refill(Stream *stream)
{
    uint32_t *s = stream->state;
#pragma omp simd
    for (int i = 0; i < STATE - MIDDLE; i++)
        s[i] = twist(s[i], s[i + 1], s[i + MIDDLE]);
#pragma omp simd safelen(128)
    for (int i = STATE - MIDDLE; i < STATE - 1; i++)
        s[i] = twist(s[i], s[i + 1], s[i + MIDDLE - STATE]);
    s[STATE - 1] = twist(s[STATE - 1], s[0], s[MIDDLE - 1]);
#pragma omp simd
    for (int i = 0; i < STATE; i++) {
        uint32_t y = s[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        stream->made[i ^ 1] = y ^ (y >> 18); /* of 64 bits the upper half is drawn first */
    }
    stream->used = 0;
}

static void seed_stream(Stream *stream, uint64_t seed)
{
    uint32_t *s = stream->state;
    s[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < STATE; i++)
        s[i] = 1812433253u * (s[i - 1] ^ (s[i - 1] >> 30)) + i;
    stream->used = 2 * STATE;
}

/* `kept` is 1 where an element stays, else 0. */
VERSIONS static void read_row(Stream *stream, float *kept, Py_ssize_t keys, int32_t level)
{
    Py_ssize_t i = 0;
    while (i < keys) {
        if (stream->used == 2 * STATE)
            refill(stream);
        Py_ssize_t n = 2 * STATE - stream->used < keys - i ? 2 * STATE - stream->used : keys - i;
        const int16_t *bits = (const int16_t *)stream->made + stream->used;
        float *out = kept + i;
#pragma omp simd
        for (Py_ssize_t j = 0; j < n; j++)
            out[j] = bits[j] >= level ? 1.0f : 0.0f;
        stream->used += (int32_t)n;
        i += n;
    }
}

/* ------------------------------------------------------------------------------------------------------ a row */

/* exp(x) to 2 units in the last place (Cephes' expf); 0 below the smallest normal number, −inf included. */
INLINE float exponential(float x)
{
    const float round = 12582912.0f; /* 1.5 · 2**23: what is added to it is rounded to an integer, in its lowest bits */
    union {
        float f;
        int32_t i;
    } n, power;
    float clipped = x < 88.0f ? x : 88.0f;
    n.f = clipped * 1.44269504088896341f + round;
    float whole = n.f - round;
    float r = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    power.f = p * (r * r) + (r + 1.0f);
    power.i += n.i << 23;
    return x < -87.0f ? 0.0f : power.f;
}

INLINE float largest_of(const float *s, Py_ssize_t keys)
{
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (Py_ssize_t j = 0; j < keys; j++)
        largest = s[j] > largest ? s[j] : largest;
    return largest;
}

INLINE Py_ssize_t count_of(const float *s, Py_ssize_t keys)
{
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (Py_ssize_t j = 0; j < keys; j++)
        count += s[j] > -INFINITY;
    return count;
}

/* Where "cap" cuts e, whose largest is 1: Newton from below; NaN where float32 has too few digits for it. */
INLINE float cap_level(const float *e, Py_ssize_t keys, float threshold, float level)
{
    for (int round = 0; round < ROUNDS; round++) {
        float rest = 0.0f, most = 0.0f;
        int32_t above = 0;
#pragma omp simd reduction(+ : rest, above) reduction(max : most)
        for (Py_ssize_t j = 0; j < keys; j++) {
            float free = e[j] <= level ? e[j] : 0.0f;
            above += e[j] > level;
            rest += free;
            most = free > most ? free : most;
        }
        level = threshold * rest / (1.0f - (float)above * threshold);
        if (most <= level)
            return level * level > FLT_MIN ? level : NAN;
    }
    return NAN;
}

typedef struct {
    float max_attention; /* T, or x of T = x/N */
    int multiple, masked, cap;
} Bound;

/* Bounds a row in place: its weights are `factor` times what it holds. 0 where refinement.py has to settle it. */
INLINE int bound_row(float *s, Py_ssize_t keys, Bound bound, float *shift, float *top, float *factor)
{
    float largest = largest_of(s, keys);
    if (largest == -INFINITY) { /* every key is masked */
        memset(s, 0, (size_t)keys * sizeof *s);
        *shift = *top = *factor = 0.0f;
        return 1;
    }
    Py_ssize_t count = bound.masked && (bound.multiple || bound.cap) ? count_of(s, keys) : keys;
    float threshold = bound.max_attention;
    if (bound.multiple)
        threshold = threshold < (float)count ? threshold / (float)count : 1.0f;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (Py_ssize_t j = 0; j < keys; j++) {
        s[j] = exponential(s[j] - largest);
        total += s[j];
    }
    float level = total * threshold;
    if (bound.cap && (float)count * threshold <= 1.0f + UNIFORM)
        level = NAN;
    else if (bound.cap && level < 1.0f)
        level = cap_level(s, keys, threshold, level);
    *shift = largest + logf(level), *top = threshold, *factor = threshold / level;
    if (!(level > 0.0f) || !isfinite(*shift))
        return 0;
#pragma omp simd
    for (Py_ssize_t j = 0; j < keys; j++)
        s[j] = s[j] < level ? s[j] : level;
    return 1;
}

VERSIONS static int bound_tile(float *scores, float *numbers, float *factors, float *kept, Stream *stream,
                               int32_t drop_level, Py_ssize_t rows, Py_ssize_t keys, Bound bound)
{
    for (Py_ssize_t i = 0; i < rows; i++) {
        float *s = scores + i * keys;
        if (!bound_row(s, keys, bound, numbers + 2 * i, numbers + 2 * i + 1, factors + i))
            return 0;
        if (stream) {
            read_row(stream, kept, keys, drop_level);
#pragma omp simd
            for (Py_ssize_t j = 0; j < keys; j++)
                s[j] *= kept[j];
        }
    }
    return 1;
}

/* From scores and the gradient at the weights (times `top`) to the bounded, kept weights (over `top`) and the gradient
   at the scores, in place. */
VERSIONS static void pull_tile(float *scores, float *slopes, const float *numbers, float *kept, Stream *stream,
                               int32_t drop_level, Py_ssize_t rows, Py_ssize_t keys, int cap, int straight_through)
{
    const float limit = straight_through ? INFINITY : 1.0f + 16.0f * FLT_EPSILON;
    float *row = kept + keys;
    for (Py_ssize_t i = 0; i < rows; i++) {
        float *s = scores + i * keys, *g = slopes + i * keys;
        float shift = numbers[2 * i], pulled = 0.0f, left = 0.0f;
        if (stream) {
            read_row(stream, kept, keys, drop_level);
#pragma omp simd
            for (Py_ssize_t j = 0; j < keys; j++)
                g[j] *= kept[j];
        }
#pragma omp simd reduction(+ : pulled, left)
        for (Py_ssize_t j = 0; j < keys; j++) {
            float e = exponential(s[j] - shift);
            float free = e <= limit ? e : 0.0f;
            s[j] = e < 1.0f ? e : 1.0f;
            row[j] = cap ? free : e;
            g[j] *= free;
            pulled += g[j];
            left += free;
        }
        pulled *= cap ? 1.0f / (left > FLT_MIN ? left : FLT_MIN) : numbers[2 * i + 1];
#pragma omp simd
        for (Py_ssize_t j = 0; j < keys; j++)
            g[j] -= row[j] * pulled;
        if (stream) {
#pragma omp simd
            for (Py_ssize_t j = 0; j < keys; j++)
                s[j] *= kept[j];
        }
    }
}

/* ------------------------------------------------------------------------------------------------------ Python */

#define AT(address) ((void *)(uintptr_t)(address))
typedef unsigned long long Address;

PyDoc_STRVAR(bound_doc, "bound(scores, numbers, factors, spare, stream, drop_level, rows, keys, max_attention, multiple, "
                        "masked, cap) -> bool\n\nWhether every row was settled; else the tile is spent.");

static PyObject *py_bound(PyObject *self, PyObject *args)
{
    Address scores, numbers, factors, spare, stream;
    int drop_level, settled;
    Py_ssize_t rows, keys;
    Bound bound;
    if (!PyArg_ParseTuple(args, "KKKKKinnfppp", &scores, &numbers, &factors, &spare, &stream, &drop_level, &rows, &keys,
                          &bound.max_attention, &bound.multiple, &bound.masked, &bound.cap))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    settled = bound_tile(AT(scores), AT(numbers), AT(factors), AT(spare), AT(stream), drop_level, rows, keys, bound);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(settled);
}

PyDoc_STRVAR(pull_doc, "pull(scores, slopes, numbers, spare, stream, drop_level, rows, keys, cap, straight_through)");

static PyObject *py_pull(PyObject *self, PyObject *args)
{
    Address scores, slopes, numbers, spare, stream;
    int drop_level, cap, straight_through;
    Py_ssize_t rows, keys;
    if (!PyArg_ParseTuple(args, "KKKKKinnpp", &scores, &slopes, &numbers, &spare, &stream, &drop_level, &rows, &keys, &cap,
                          &straight_through))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pull_tile(AT(scores), AT(slopes), AT(numbers), AT(spare), AT(stream), drop_level, rows, keys, cap, straight_through);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(seed_doc, "seed(stream, seed)\n\nOpen the stream that torch.Generator().manual_seed(seed) opens.");

static PyObject *py_seed(PyObject *self, PyObject *args)
{
    Address stream, seed;
    if (!PyArg_ParseTuple(args, "KK", &stream, &seed))
        return NULL;
    seed_stream(AT(stream), seed);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(read_doc, "read(stream, kept, count, drop_level)\n\nThe next elements of a stream, as 1.0 or 0.0.");

static PyObject *py_read(PyObject *self, PyObject *args)
{
    Address stream, kept;
    Py_ssize_t count;
    int drop_level;
    if (!PyArg_ParseTuple(args, "KKni", &stream, &kept, &count, &drop_level))
        return NULL;
    read_row(AT(stream), AT(kept), count, drop_level);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"bound", py_bound, METH_VARARGS, bound_doc},
    {"pull", py_pull, METH_VARARGS, pull_doc},
    {"seed", py_seed, METH_VARARGS, seed_doc},
    {"read", py_read, METH_VARARGS, read_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", "Rows of refined attention; see _rows.c.", -1, methods};

PyMODINIT_FUNC PyInit__rows(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "STREAM_BYTES", sizeof(Stream)) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
