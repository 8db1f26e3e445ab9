/*
The phantom: CT and MR slices of made-up patients, from a seed, with nothing but a C compiler.

  phantom_make           writes one folder of shards for a range of patients
  phantom_make_sets      writes DIR/train and DIR/eval, with no patient in both
  phantom_classes        the class names: head, neck, thorax, abdomen, pelvis, limb

A patient is an implicit body: for any point (x, y, z) in mm it says which tissue is there. An outline (a superellipse whose
half-axes follow the body's axis) holds skin, fat, a muscle wall and a cavity; some six hundred ellipsoids and tubes, painted
in order, are the organs, vessels and bones. Low-frequency waves bend all of it. A slice is that body sampled on a plane,
given an intensity per tissue, a bias field, blur and noise.

What tells the regions apart is the anatomy. What does not (size, field of view, rotation, contrast, fat, arms, noise, and
CT or MR, which share the six labels) is drawn at random, and strongly, so that likeness of pixels says little about the region.
A seed gives the same bytes whatever the compiler's flags; only another mathematics library may round otherwise.
*/
#ifndef CURIA_PHANTOM_H
#define CURIA_PHANTOM_H

#include "anatomy.h"

// Multiplications and additions are rounded one by one, so that every program that includes this gives the same bytes.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

static const char *const phantom_classes = "head\nneck\nthorax\nabdomen\npelvis\nlimb\n";
enum { REGION_HEAD, REGION_NECK, REGION_THORAX, REGION_ABDOMEN, REGION_PELVIS, REGION_LIMB, PHANTOM_REGIONS };

// T_CAVITY is the fat inside the muscle wall: organs are painted over it and over each other, never over the wall.
enum {
    T_AIR, T_TABLE, T_SKIN, T_FAT, T_MUSCLE, T_CAVITY, T_BONE, T_MARROW, T_LUNG, T_GRAY, T_WHITE, T_FLUID, T_BLOOD, T_LIVER,
    T_SPLEEN, T_KIDNEY, T_BOWEL, T_GAS, T_DISC, T_GLAND, T_HEART, T_LESION, T_METAL, PHANTOM_TISSUES
};
enum {
    OVER_BODY = ((1 << PHANTOM_TISSUES) - 1) & ~(1 << T_AIR | 1 << T_TABLE),
    OVER_INSIDE = OVER_BODY & ~(1 << T_SKIN | 1 << T_FAT | 1 << T_MUSCLE),
    OVER_SOFT = OVER_BODY & ~(1 << T_SKIN | 1 << T_BONE),
    OVER_AIR = 1 << T_AIR
};

// HU of each tissue, and its signal in a T1- and a T2-weighted MR sequence (1 is fat at T1).
static const struct { float hu, t1, t2; } phantom_tissue[PHANTOM_TISSUES] = {
    [T_AIR] = {-1000, .01f, .01f}, [T_TABLE] = {-150, .01f, .01f}, [T_SKIN] = {30, .5f, .4f}, [T_FAT] = {-100, 1, .7f},
    [T_MUSCLE] = {55, .42f, .25f}, [T_CAVITY] = {-95, .95f, .65f}, [T_BONE] = {750, .06f, .05f}, [T_MARROW] = {220, .75f, .5f},
    [T_LUNG] = {-840, .08f, .1f}, [T_GRAY] = {38, .45f, .6f}, [T_WHITE] = {28, .62f, .42f}, [T_FLUID] = {8, .16f, 1.1f},
    [T_BLOOD] = {45, .25f, .15f}, [T_LIVER] = {58, .52f, .33f}, [T_SPLEEN] = {50, .4f, .55f}, [T_KIDNEY] = {35, .42f, .62f},
    [T_BOWEL] = {35, .4f, .5f}, [T_GAS] = {-950, .01f, .01f}, [T_DISC] = {80, .35f, .6f}, [T_GLAND] = {65, .48f, .52f},
    [T_HEART] = {48, .4f, .4f}, [T_LESION] = {30, .35f, .8f}, [T_METAL] = {2800, .01f, .01f}
};

// An ellipsoid, or a tube of elliptic section along z. Only inner <= radius is painted (a shell where inner > 0), only on
// the side the clip vector points to, and only over the tissues of `over`. Where texture > 0, waves of that length in mm
// turn part of it into `other` (0: fat).
typedef struct {
    float x, y, z, rx, ry, rz, inner, clip_x, clip_y, texture;
    int tube, tissue, other;
    uint32_t over;
} PhantomPart;

enum { PHANTOM_MAX_PARTS = 800, PHANTOM_STEP = 4, PHANTOM_LEVELS = 440, PHANTOM_CROTCH = 1045, PHANTOM_FEET = 1720 };

typedef struct { float a, b, y, fat, wall, corner; } PhantomLevel;

typedef struct {
    PhantomPart parts[PHANTOM_MAX_PARTS];
    int n_parts;
    PhantomLevel levels[PHANTOM_LEVELS];  // the outline every PHANTOM_STEP mm from the vertex down
    float leg_x, leg_scale, scale;        // scale: mm of this patient per mm of the body
    float wave[9][5];                     // bending: amplitude, then wave vector and phase, three waves per coordinate
    float rib_phase, septa;
    Rng rng;
} PhantomBody;

// Adds a part with its centre and radii disturbed by `vary`: the fraction of a radius that one standard deviation is.
static inline PhantomPart *phantom_part(PhantomBody *p, float vary, int tissue, uint32_t over, float x, float y, float z, float rx,
                                        float ry, float rz) {
    if (p->n_parts == PHANTOM_MAX_PARTS)
        fail(STATUS_FAILED, "the phantom has more than %d parts; raise PHANTOM_MAX_PARTS", PHANTOM_MAX_PARTS);
    PhantomPart *o = &p->parts[p->n_parts++];
    *o = (PhantomPart){.tissue = tissue, .over = over};
    float centre[3] = {x, y, z}, radius[3] = {rx, ry, rz};
    for (int i = 0; i < 3; i++) {
        centre[i] += (float)(vary * radius[i] * rng_normal(&p->rng));
        radius[i] *= (float)exp(vary * rng_normal(&p->rng));
    }
    o->x = centre[0], o->y = centre[1], o->z = centre[2];
    o->rx = radius[0], o->ry = radius[1], o->rz = radius[2];
    return o;
}

static inline PhantomPart *phantom_tube(PhantomBody *p, float vary, int tissue, uint32_t over, float x, float y, float z, float rx,
                                        float ry, float rz) {
    PhantomPart *o = phantom_part(p, vary, tissue, over, x, y, z, rx, ry, rz);
    o->tube = 1;
    return o;
}

// Long bone or vessel with a wall: the outer tube, then the lumen.
static inline void phantom_pipe(PhantomBody *p, int outer, int lumen, uint32_t over, float x, float y, float z, float r,
                                float thick, float rz) {
    int at = p->n_parts;
    phantom_tube(p, 0.08f, outer, over, x, y, z, r, r, rz);
    PhantomPart inside = p->parts[at];
    inside.tissue = lumen;
    inside.over = 1u << outer;
    inside.rx *= 1 - thick;
    inside.ry *= 1 - thick;
    p->parts[p->n_parts++] = inside;
}

// The outline: half-axes in x and y and the centre's y, in mm at z mm below the vertex, lean; then the wall's thickness.
static inline void phantom_outline(PhantomBody *p, float fatness, float build) {
    static const float table[][5] = {
        {0, 8, 10, 0, 3},        {15, 50, 62, 0, 4},     {40, 68, 86, 0, 4},     {90, 77, 98, 0, 4},
        {140, 74, 96, -2, 5},    {185, 66, 88, -6, 8},   {212, 60, 74, 0, 14},   {235, 57, 60, 8, 20},
        {280, 58, 60, 10, 20},   {300, 82, 68, 10, 25},  {320, 140, 80, 8, 34},  {350, 182, 96, 5, 34},
        {400, 168, 106, 2, 26},  {460, 156, 112, 0, 20}, {550, 150, 112, 0, 17}, {620, 146, 108, 0, 16},
        {700, 140, 104, 0, 17},  {780, 144, 104, 0, 18}, {850, 158, 108, 4, 24}, {920, 170, 114, 8, 34},
        {1000, 174, 112, 8, 44}, {1060, 170, 104, 6, 50}};
    int rows = sizeof table / sizeof *table;
    float wide = (float)rng_range(&p->rng, 0.92, 1.08), deep = (float)rng_range(&p->rng, 0.92, 1.1),
          belly = (float)rng_range(&p->rng, 0.8, 1.5);
    for (int i = 0, k = 0; i < PHANTOM_LEVELS; i++) {
        float z = (float)i * PHANTOM_STEP;
        while (k < rows - 2 && z > table[k + 1][0]) k++;
        float t = (z - table[k][0]) / (table[k + 1][0] - table[k][0]), v[5];
        t = t > 1 ? 1 : t;
        t = t * t * (3 - 2 * t);
        for (int j = 0; j < 5; j++) v[j] = table[k][j] + t * (table[k + 1][j] - table[k][j]);
        float trunk = z < 200 ? 0.15f : z < 330 ? 0.15f + 0.6f * (z - 200) / 130 : z < 550 ? 0.75f : 1;
        float middle = belly * expf(-(z - 740) * (z - 740) / 30000);
        float fat = 4 + fatness * trunk, muscular = z < 220 ? 1 : build;
        p->levels[i] = (PhantomLevel){
            .a = v[1] * wide * (z > 300 ? 0.5f + 0.5f * build : 1) + fat - 4, .b = v[2] * deep + (fat - 4) * (1 + 0.5f * middle),
            .y = v[3] - 0.25f * (fat - 4) * middle, .fat = fat, .wall = v[4] * muscular, .corner = z < 300 ? 0.1f : 0.45f};
    }
}

static inline void phantom_spine(PhantomBody *p) {
    float curve = (float)rng_range(&p->rng, 0.7, 1.3), scoliosis = (float)(6 * rng_normal(&p->rng)), z = 195;
    for (int i = 0; i < 25; i++) {
        float t = i / 24.0f, height = i < 7 ? 15 : 21 + 12 * (i - 7) / 17.0f, r = i < 7 ? 10 : 13 + 9 * (i - 7) / 17.0f;
        float y = i < 7    ? 18 + 3 * i
                  : i < 19 ? 40 + 20 * sinf((i - 7) / 12.0f * 3.14f) * curve
                           : 42 - 14 * sinf((i - 19) / 6.0f * 3.14f) * curve;
        float x = scoliosis * sinf(t * 6.3f);
        z += height / 2;
        phantom_tube(p, 0.04f, T_BONE, OVER_BODY, x, y, z, r, 0.75f * r, 0.41f * height);
        phantom_tube(p, 0.04f, T_MARROW, 1 << T_BONE, x, y, z, 0.84f * r, 0.6f * r, 0.36f * height);
        phantom_tube(p, 0.02f, T_DISC, OVER_SOFT, x, y, z + height / 2, 0.92f * r, 0.7f * r, 0.09f * height);
        PhantomPart *arch = phantom_tube(p, 0.05f, T_BONE, OVER_BODY, x, y + 0.75f * r + 9, z, 14, 11, 0.3f * height);
        arch->inner = 0.7f;
        phantom_part(p, 0.08f, T_BONE, OVER_BODY, x, y + 0.75f * r + 26, z + 4, 3.5f, i < 7 ? 8 : 13, 0.33f * height);
        if (i > 6)
            for (int side = -1; side <= 1; side += 2)
                phantom_part(p, 0.1f, T_BONE, OVER_BODY, x + side * (r + 14), y + 0.75f * r + 8, z, 14, 5, 0.25f * height);
        phantom_tube(p, 0, T_FLUID, OVER_BODY, x, y + 0.75f * r + 9, z, 8, 7, 0.52f * height);
        if (i < 20) phantom_tube(p, 0, T_WHITE, OVER_BODY, x, y + 0.75f * r + 9, z, 5, 4, 0.52f * height);
        z += height / 2;
    }
}

static inline void phantom_head(PhantomBody *p) {
    phantom_part(p, 0.02f, T_BONE, OVER_BODY, 0, 2, 92, 70, 89, 84);
    PhantomPart *brain = phantom_part(p, 0.02f, T_GRAY, 1 << T_BONE, 0, 2, 92, 63, 82, 77);
    brain->texture = 11;
    brain->other = T_FLUID;
    for (int side = -1; side <= 1; side += 2) {
        PhantomPart *white = phantom_part(p, 0.05f, T_WHITE, 1 << T_GRAY | 1 << T_FLUID, side * 28, 2, 84, 24, 62, 50);
        white->texture = 24;
        white->other = T_GRAY;
        phantom_part(p, 0.12f, T_FLUID, 1 << T_GRAY | 1 << T_WHITE, side * 11, -8, 82, 7, 26, 14);
        phantom_part(p, 0.12f, T_FLUID, 1 << T_GRAY | 1 << T_WHITE, side * 20, 28, 88, 6, 16, 11);
        phantom_part(p, 0.1f, T_GRAY, 1 << T_GRAY | 1 << T_WHITE, side * 14, 2, 96, 9, 15, 11);
        phantom_part(p, 0.1f, T_WHITE, 1 << T_GRAY | 1 << T_FLUID, side * 26, 50, 140, 24, 20, 18)->texture = 9;
        phantom_part(p, 0.04f, T_CAVITY, OVER_BODY, side * 31, -72, 118, 18, 22, 17);
        phantom_part(p, 0.04f, T_FLUID, OVER_BODY, side * 31, -80, 118, 12, 12, 12);
        phantom_part(p, 0.15f, T_GAS, OVER_BODY, side * 28, -62, 150, 14, 16, 16);
        phantom_part(p, 0.1f, T_BONE, OVER_BODY, side * 48, 12, 138, 16, 12, 10);
        PhantomPart *mastoid = phantom_part(p, 0.1f, T_GAS, OVER_BODY, side * 52, 24, 144, 11, 12, 13);
        mastoid->texture = 7;
        mastoid->other = T_BONE;
        phantom_part(p, 0.1f, T_GLAND, OVER_SOFT, side * 52, 8, 172, 11, 17, 20);
    }
    phantom_part(p, 0.05f, T_MUSCLE, OVER_BODY, 0, -50, 178, 46, 42, 30);
    phantom_part(p, 0.15f, T_GAS, OVER_BODY, 0, -74, 150, 7, 26, 22);
    phantom_part(p, 0.2f, T_GAS, OVER_BODY, 0, -84, 92, 16, 6, 13);
    phantom_tube(p, 0.1f, T_GAS, OVER_BODY, 0, -14, 172, 11, 6, 30);
    PhantomPart *jaw = phantom_tube(p, 0.04f, T_BONE, OVER_BODY, 0, -34, 192, 48, 50, 14);
    jaw->inner = 0.72f;
    jaw->clip_y = -1;
    PhantomPart *teeth = phantom_tube(p, 0.06f, rng_uniform(&p->rng) < 0.2 ? T_METAL : T_BONE, OVER_BODY, 0, -44, 176, 30, 40, 7);
    teeth->inner = 0.62f;
    teeth->clip_y = -1;
    PhantomPart *falx = phantom_part(p, 0, T_FLUID, 1 << T_GRAY | 1 << T_WHITE, 0, 0, 60, 1.5f, 76, 44);
    falx->texture = 30;
    falx->other = T_DISC;
}

static inline void phantom_neck(PhantomBody *p) {
    PhantomPart *fat = phantom_part(p, 0.05f, T_CAVITY, 1 << T_MUSCLE, 0, -6, 262, 46, 32, 54);
    fat->texture = 26;
    fat->other = T_MUSCLE;
    for (int side = -1; side <= 1; side += 2) {
        phantom_tube(p, 0.12f, T_MUSCLE, OVER_SOFT, side * 38, 2, 265, 12, 16, 60);
        phantom_tube(p, 0.12f, T_BLOOD, OVER_SOFT, side * 24, -4, 270, 5, 5, 90);
        phantom_tube(p, 0.2f, T_BLOOD, OVER_SOFT, side * 32, 0, 270, 8, 6, 80);
        phantom_part(p, 0.15f, T_GLAND, OVER_SOFT, side * 14, -22, 288, 9, 10, 24);
        phantom_part(p, 0.15f, T_GLAND, OVER_SOFT, side * 32, -22, 222, 11, 14, 13);
    }
    PhantomPart *cartilage = phantom_tube(p, 0.08f, T_BONE, OVER_SOFT, 0, -26, 258, 19, 20, 16);
    cartilage->inner = 0.8f;
    cartilage->clip_y = -1;
    phantom_part(p, 0.15f, T_BOWEL, OVER_SOFT, 4, 0, 300, 7, 5, 70);
    phantom_tube(p, 0.1f, T_GLAND, OVER_SOFT, 0, -16, 300, 12, 12, 70);
    phantom_tube(p, 0.1f, T_GAS, OVER_BODY, 0, -16, 300, 9, 9, 80);
}

static inline void phantom_thorax(PhantomBody *p) {
    float fill = (float)rng_range(&p->rng, 0.88, 1.06);
    for (int side = -1; side <= 1; side += 2) {
        phantom_part(p, 0.03f, T_LUNG, OVER_INSIDE, side * 66, 0, 470, 58 * fill, 88 * fill, 142);
        phantom_part(p, 0.1f, T_BLOOD, 1 << T_LUNG, side * 34, 6, 445, 16, 10, 16);
        for (int i = 0; i < 7; i++) {
            float x = side * (float)rng_range(&p->rng, 32, 100), y = (float)rng_range(&p->rng, -45, 55),
                  z = (float)rng_range(&p->rng, 390, 540);
            phantom_part(p, 0.25f, T_BLOOD, 1 << T_LUNG, x, y, z, 4, 4, 16);
        }
        PhantomPart *scapula = phantom_part(p, 0.06f, T_BONE, OVER_SOFT, side * 84, 16, 400, 66, 74, 74);
        scapula->inner = 0.93f;
        scapula->clip_x = side * 0.7f;
        scapula->clip_y = 0.7f;
        phantom_part(p, 0.08f, T_BONE, OVER_SOFT, side * 74, -38, 322, 64, 7, 8);
        phantom_part(p, 0.05f, T_BONE, OVER_SOFT, side * 152, 2, 348, 22, 22, 24);
        phantom_part(p, 0.05f, T_MARROW, 1 << T_BONE, side * 152, 2, 348, 18, 18, 20);
    }
    phantom_tube(p, 0.1f, T_CAVITY, OVER_INSIDE, 0, -4, 440, 27, 74, 120);
    phantom_part(p, 0.08f, T_HEART, OVER_INSIDE, 18, -26, 515, 56, 48, 56);
    phantom_part(p, 0.1f, T_BLOOD, 1 << T_HEART, 34, -20, 518, 24, 24, 34);
    phantom_part(p, 0.1f, T_BLOOD, 1 << T_HEART, -8, -40, 516, 24, 20, 36);
    phantom_part(p, 0.1f, T_BLOOD, 1 << T_HEART, -4, 4, 490, 30, 17, 22);
    phantom_part(p, 0.08f, T_BLOOD, OVER_INSIDE, 10, 4, 410, 16, 46, 14);
    phantom_tube(p, 0.08f, T_BLOOD, OVER_INSIDE, -10, -26, 445, 15, 15, 36);
    phantom_tube(p, 0.08f, T_BLOOD, OVER_INSIDE, -32, -14, 430, 9, 9, 62);
    phantom_tube(p, 0.08f, T_BLOOD, OVER_INSIDE, 14, -22, 452, 14, 14, 26);
    phantom_tube(p, 0.1f, T_GAS, OVER_INSIDE, 0, 8, 385, 9, 8, 55);
    for (int side = -1; side <= 1; side += 2) phantom_part(p, 0.1f, T_GAS, OVER_INSIDE, side * 18, 12, 446, 14, 6, 12);
    phantom_tube(p, 0.08f, T_BONE, OVER_SOFT, 0, -88, 440, 17, 6, 85);
    phantom_tube(p, 0.08f, T_BLOOD, OVER_INSIDE, 22, 42, 515, 12, 12, 105);
    if (rng_uniform(&p->rng) < 0.4)
        for (int side = -1; side <= 1; side += 2) {
            PhantomLevel *at = &p->levels[450 / PHANTOM_STEP];
            float size = (float)rng_range(&p->rng, 32, 58);
            phantom_part(p, 0.08f, T_FAT, OVER_AIR, side * 74, at->y - at->b * 0.88f, 470, size, size * 0.8f, size);
            phantom_part(p, 0.2f, T_GLAND, 1 << T_FAT, side * 74, at->y - at->b * 0.9f, 470, size * 0.6f, size * 0.5f, size * 0.6f)
                ->texture = 14;
        }
    if (rng_uniform(&p->rng) < 0.25) {  // an effusion
        int side = rng_uniform(&p->rng) < 0.5 ? -1 : 1;
        phantom_part(p, 0.2f, T_FLUID, 1 << T_LUNG, side * 74, 70, 540, 60, 34, 90);
    }
}

static inline void phantom_bowel(PhantomBody *p, int n, float z0, float z1, float reach) {
    for (int i = 0; i < n; i++) {
        float x = (float)rng_range(&p->rng, -reach, reach), y = (float)rng_range(&p->rng, -72, 12),
              z = (float)rng_range(&p->rng, z0, z1);
        float r = (float)rng_range(&p->rng, 11, 21);
        phantom_part(p, 0.15f, T_BOWEL, 1 << T_CAVITY | 1 << T_BOWEL | 1 << T_FLUID | 1 << T_GAS, x, y, z, r * 1.4f, r, r);
        phantom_part(p, 0.05f,
                     rng_uniform(&p->rng) < 0.35  ? T_GAS
                     : rng_uniform(&p->rng) < 0.5 ? T_FLUID
                                                  : T_BOWEL,
                     1 << T_BOWEL, x, y - 2, z, r, 0.65f * r, 0.7f * r);
    }
}

static inline void phantom_abdomen(PhantomBody *p) {
    phantom_bowel(p, 34, 690, 880, 100);
    for (int side = -1; side <= 1; side += 2) {
        phantom_tube(p, 0.1f, T_BOWEL, 1 << T_CAVITY | 1 << T_BOWEL, side * 102, 12, 745, 20, 21, 90);
        phantom_tube(p, 0.12f, rng_uniform(&p->rng) < 0.6 ? T_GAS : T_FLUID, 1 << T_BOWEL, side * 102, 8, 745, 14, 12, 80);
        phantom_tube(p, 0.1f, T_MUSCLE, OVER_INSIDE, side * 36, 42, 800, 19, 18, 110);
        float z = 695 + 14 * (side < 0);
        phantom_part(p, 0.06f, T_CAVITY, OVER_INSIDE, side * 66, 38, z, 44, 36, 66);
        phantom_part(p, 0.06f, T_KIDNEY, OVER_INSIDE, side * 64, 38, z, 28, 24, 54);
        phantom_part(p, 0.12f, T_CAVITY, 1 << T_KIDNEY, side * 55, 34, z, 14, 11, 28);
        phantom_part(p, 0.25f, T_FLUID, 1 << T_CAVITY, side * 53, 33, z, 8, 7, 16);
    }
    phantom_part(p, 0.06f, T_LIVER, OVER_INSIDE, -56, -8, 625, 80, 82, 74);
    phantom_part(p, 0.08f, T_LIVER, OVER_INSIDE, 6, -48, 610, 64, 34, 42);
    for (int i = 0; i < 5; i++) {
        float x = (float)rng_range(&p->rng, -100, -10), y = (float)rng_range(&p->rng, -50, 40),
              z = (float)rng_range(&p->rng, 580, 680);
        phantom_part(p, 0.2f, T_BLOOD, 1 << T_LIVER, x, y, z, 5, 22, 6);
    }
    phantom_part(p, 0.15f, T_FLUID, OVER_INSIDE, -48, -58, 672, 15, 18, 28);
    phantom_part(p, 0.12f, T_BOWEL, OVER_INSIDE, 56, -34, 630, 44, 42, 52);
    phantom_part(p, 0.12f, rng_uniform(&p->rng) < 0.5 ? T_GAS : T_FLUID, 1 << T_BOWEL, 56, -46, 628, 34, 24, 40);
    phantom_part(p, 0.1f, T_SPLEEN, OVER_INSIDE, 100, 36, 625, 27, 46, 52);
    phantom_part(p, 0.12f, T_GLAND, OVER_INSIDE, 6, -6, 682, 58, 12, 15)->texture = 13;
    phantom_tube(p, 0.08f, T_BLOOD, OVER_INSIDE, 12, 18, 715, 11, 11, 125);
    phantom_tube(p, 0.1f, T_BLOOD, OVER_INSIDE, -18, 18, 690, 13, 10, 150);
}

static inline void phantom_pelvis(PhantomBody *p) {
    phantom_bowel(p, 10, 880, 950, 60);
    float full = (float)rng_range(&p->rng, 0.6, 1.35);
    phantom_part(p, 0.08f, T_BOWEL, OVER_INSIDE, 0, -34, 995, 43 * full + 4, 35 * full + 4, 34 * full + 4);
    phantom_part(p, 0, T_FLUID, 1 << T_BOWEL, 0, -34, 995, 43 * full, 35 * full, 34 * full);
    phantom_part(p, 0.12f, T_GLAND, OVER_INSIDE, 0, 4, 990, rng_uniform(&p->rng) < 0.5 ? 40 : 22, 18, 24);
    phantom_tube(p, 0.1f, T_BOWEL, OVER_INSIDE, 0, 40, 985, 19, 18, 60);
    phantom_tube(p, 0.2f, rng_uniform(&p->rng) < 0.5 ? T_GAS : T_GLAND, 1 << T_BOWEL, 0, 38, 985, 12, 10, 55);
    phantom_part(p, 0.05f, T_BONE, OVER_BODY, 0, 72, 920, 48, 18, 58);
    PhantomPart *sacrum = phantom_part(p, 0.04f, T_MARROW, 1 << T_BONE, 0, 72, 920, 43, 13, 53);
    sacrum->texture = 20;
    sacrum->other = T_BONE;
    int prosthesis = rng_uniform(&p->rng) < 0.08 ? (rng_uniform(&p->rng) < 0.5 ? -1 : 1) : 0;
    for (int side = -1; side <= 1; side += 2) {
        PhantomPart *ilium = phantom_part(p, 0.05f, T_BONE, OVER_BODY, side * 62, 4, 900, 72, 86, 84);
        ilium->inner = 0.84f;
        ilium->clip_x = side * 0.8f;
        ilium->clip_y = 0.35f;
        PhantomPart *inside = phantom_part(p, 0.03f, T_MARROW, 1 << T_BONE, side * 62, 4, 900, 69, 83, 80);
        inside->inner = 0.88f;
        inside->clip_x = side * 0.8f;
        inside->clip_y = 0.35f;
        PhantomPart *socket = phantom_part(p, 0.04f, T_BONE, OVER_BODY, side * 92, 4, 988, 34, 34, 34);
        socket->inner = 0.8f;
        socket->clip_x = -side;
        phantom_part(p, 0.04f, T_BONE, OVER_BODY, side * 94, 4, 990, 25, 25, 25);
        phantom_part(p, 0.03f, prosthesis == side ? T_METAL : T_MARROW, 1 << T_BONE, side * 94, 4, 990, 21, 21, 21);
        phantom_part(p, 0.06f, T_BONE, OVER_BODY, side * 138, 16, 1005, 22, 24, 30);
        phantom_part(p, 0.06f, T_MARROW, 1 << T_BONE, side * 138, 16, 1005, 17, 19, 25);
        phantom_part(p, 0.06f, T_BONE, OVER_BODY, side * 116, 8, 998, 26, 11, 11);
        phantom_part(p, 0.08f, T_BONE, OVER_BODY, side * 34, -56, 1012, 34, 11, 11);
        phantom_part(p, 0.08f, T_BONE, OVER_BODY, side * 56, 40, 1030, 17, 18, 28);
        phantom_tube(p, 0.12f, T_BLOOD, OVER_SOFT, side * 70, -62, 975, 7, 7, 110);
    }
}

static inline void phantom_limb(PhantomBody *p) {
    float s = p->leg_scale;
    for (int side = -1; side <= 1; side += 2) {
        float x = side * p->leg_x;
        phantom_pipe(p, T_BONE, T_MARROW, OVER_BODY, x + side * 4, 0, 1235, 15 * s, 0.42f, 215);
        phantom_part(p, 0.05f, T_BONE, OVER_BODY, x, 4, 1462, 38 * s, 30 * s, 34);
        phantom_part(p, 0.03f, T_MARROW, 1 << T_BONE, x, 4, 1462, 34 * s, 26 * s, 31);
        phantom_part(p, 0.08f, T_BONE, OVER_BODY, x, -44 * s, 1450, 20, 9, 21);
        phantom_tube(p, 0.05f, T_DISC, OVER_BODY, x, 4, 1499, 36 * s, 27 * s, 4);
        phantom_part(p, 0.05f, T_BONE, OVER_BODY, x, 4, 1532, 36 * s, 27 * s, 30);
        phantom_part(p, 0.03f, T_MARROW, 1 << T_BONE, x, 4, 1532, 33 * s, 24 * s, 28);
        phantom_pipe(p, T_BONE, T_MARROW, OVER_BODY, x - side * 4, -12 * s, 1630, 13 * s, 0.45f, 110);
        phantom_pipe(p, T_BONE, T_MARROW, OVER_BODY, x + side * 26 * s, 8 * s, 1630, 6 * s, 0.5f, 110);
        phantom_tube(p, 0.15f, T_BLOOD, OVER_SOFT, x - side * 26 * s, -6, 1280, 6, 6, 210);
        phantom_tube(p, 0.15f, T_BLOOD, OVER_SOFT, x - side * 32 * s, 2, 1280, 8, 7, 210);
        phantom_tube(p, 0.2f, T_CAVITY, 1 << T_MUSCLE, x, 30 * s, 1330, 15, 11, 150);
    }
}

// Arms beside the trunk or above the head, over the air around the body.
static inline void phantom_arms(PhantomBody *p) {
    double where = rng_uniform(&p->rng);
    if (where < 0.45) return;
    int up = where > 0.75;
    for (int side = -1; side <= 1; side += 2) {
        float z0 = up ? 40 : 380, z1 = up ? 340 : 960;
        for (float z = z0; z < z1; z += 28) {
            float out = up ? 118 + 0.18f * (z - z0) : p->levels[(int)z / PHANTOM_STEP].a + 44,
                  r = (z - z0 < (z1 - z0) / 2) ^ up ? 42 : 34;
            float y = 8 + 10 * sinf(z / 90);
            int forearm = r < 40;
            phantom_tube(p, 0, T_FAT, OVER_AIR, side * out, y, z, r, r, 14.5f);
            phantom_tube(p, 0, T_MUSCLE, 1 << T_FAT, side * out, y, z, r * 0.84f, r * 0.84f, 14.5f);
            for (int bone = 0; bone <= forearm; bone++) {
                float x = side * out + (forearm ? (bone ? 11 : -11) : 0);
                phantom_tube(p, 0, T_BONE, 1 << T_MUSCLE, x, y, z, forearm ? 7 : 11, forearm ? 7 : 11, 14.5f);
                phantom_tube(p, 0, T_MARROW, 1 << T_BONE, x, y, z, forearm ? 4 : 6, forearm ? 4 : 6, 14.5f);
            }
        }
    }
}

static inline void phantom_body(PhantomBody *p, uint64_t seed, uint64_t patient) {
    p->n_parts = 0;
    p->rng = rng_at(seed, RNG_PHANTOM, 0, patient, 0);
    float fatness = (float)exp(rng_range(&p->rng, log(4), log(58))), build = (float)rng_range(&p->rng, 0.78, 1.25);
    p->scale = (float)rng_range(&p->rng, 0.78, 1.18);
    p->rib_phase = (float)rng_range(&p->rng, 0, 26);
    p->septa = (float)rng_range(&p->rng, 0.04, 0.22);
    p->leg_scale = (float)(0.9 + 0.1 * build);
    p->leg_x = (float)rng_range(&p->rng, 84, 104) + 0.5f * fatness;
    for (int i = 0; i < 9; i++) {
        double length = rng_range(&p->rng, i % 3 ? 70 : 160, i % 3 ? 160 : 400), u = rng_range(&p->rng, -1, 1),
               angle = rng_range(&p->rng, 0, 6.2832);
        double k = 6.2832 / length, across = sqrt(1 - u * u), size = rng_range(&p->rng, 0.008, 0.022) * length;
        double wave[5] = {size, k * across * cos(angle), k * across * sin(angle), k * u, rng_range(&p->rng, 0, 6.2832)};
        for (int j = 0; j < 5; j++) p->wave[i][j] = (float)wave[j];
    }
    phantom_outline(p, fatness, build);
    phantom_abdomen(p);
    phantom_thorax(p);
    phantom_pelvis(p);
    phantom_limb(p);
    phantom_neck(p);
    phantom_head(p);
    phantom_spine(p);
    phantom_arms(p);
    for (int i = (int)rng_below(&p->rng, 6); i > 0; i--) {
        float x = (float)rng_range(&p->rng, -80, 80), y = (float)rng_range(&p->rng, -60, 60);
        float z = (float)rng_range(&p->rng, 40, 1500), r = (float)rng_range(&p->rng, 5, 17);
        phantom_part(p, 0.2f, T_LESION, OVER_INSIDE | 1 << T_MUSCLE, x, y, z, r, r, r);
    }
}

// The tissue at a point of the body, before the parts are painted: outline, skin, fat, wall, ribs, cavity.
static inline int phantom_ground(const PhantomBody *p, float x, float y, float z) {
    if (z < 0 || z > PHANTOM_FEET) return T_AIR;
    float a, b, fat, wall, corner;
    if (z < PHANTOM_CROTCH) {
        float at = z / PHANTOM_STEP;
        const PhantomLevel *l = &p->levels[(int)at], *m = l + 1;
        float t = at - (int)at;
        a = l->a + t * (m->a - l->a), b = l->b + t * (m->b - l->b), fat = l->fat + t * (m->fat - l->fat),
        wall = l->wall + t * (m->wall - l->wall);
        y -= l->y + t * (m->y - l->y);
        corner = l->corner;
    } else {
        float down = (z - PHANTOM_CROTCH) / (PHANTOM_FEET - PHANTOM_CROTCH);
        float knee = 0.78f - 0.36f * down + 0.10f * expf(-(down - 0.78f) * (down - 0.78f) / 0.012f);
        fat = 4 + 0.6f * (p->levels[PHANTOM_CROTCH / PHANTOM_STEP].fat - 4) * (1 - 0.6f * down);
        a = 104 * knee * p->leg_scale + fat - 4, b = 1.05f * a, wall = 1000, corner = 0.05f;
        x = fabsf(x) - p->leg_x;
    }
    float u = x / a, v = y / b, square = u * u + v * v;
    float s = sqrtf((1 - corner) * square + corner * sqrtf(u * u * u * u + v * v * v * v));
    float depth = (1 - s) * (a < b ? a : b);
    if (depth <= 0) return T_AIR;
    if (depth < 2) return T_SKIN;
    float side = z > 330 && z < PHANTOM_CROTCH ? fat * (1 + 0.25f * v * v) : fat;
    if (depth < side) return T_FAT;
    if (depth < side + wall) {
        if (z > 350 && z < 640 && depth > side + wall - 9) {
            float along = (z - 0.45f * y + p->rib_phase) * (1 / 27.0f);
            if (along - floorf(along) < 0.42f) return depth > side + wall - 7 && depth < side + wall - 2 ? T_MARROW : T_BONE;
        }
        return fabsf(sinf(x * 0.062f + 1.7f * sinf(y * 0.043f)) * sinf(y * 0.071f - 1.3f * sinf(x * 0.037f) + z * 0.003f)) <
                       p->septa * 0.5f
                   ? T_FAT
                   : T_MUSCLE;
    }
    return z < 318 ? T_MUSCLE : T_CAVITY;
}

typedef struct { float centre[3], across[3], down[3]; } PhantomPlane; // mm of the body per pixel along columns and rows

// Samples the body on a plane: tissue [rows][cols]; at: scratch of 3*rows*cols floats.
static inline void phantom_sample(const PhantomBody *p, const PhantomPlane *f, int rows, int cols, uint8_t *tissue, float *at) {
    enum { NODE = 8, NODES = 40 };
    static _Thread_local float bend[NODES][NODES][3];
    for (int i = 0; i <= (rows - 1) / NODE + 1; i++)
        for (int j = 0; j <= (cols - 1) / NODE + 1; j++) {
            float q[3];
            for (int d = 0; d < 3; d++)
                q[d] = f->centre[d] + (j * NODE - 0.5f * (cols - 1)) * f->across[d] + (i * NODE - 0.5f * (rows - 1)) * f->down[d];
            for (int d = 0; d < 3; d++) {
                bend[i][j][d] = 0;
                for (int k = 3 * d; k < 3 * d + 3; k++)
                    bend[i][j][d] +=
                        p->wave[k][0] * sinf(p->wave[k][1] * q[0] + p->wave[k][2] * q[1] + p->wave[k][3] * q[2] + p->wave[k][4]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            int i = r / NODE, j = c / NODE;
            float u = (float)(r % NODE) / NODE, v = (float)(c % NODE) / NODE, *q = &at[3 * (r * cols + c)];
            for (int d = 0; d < 3; d++)
                q[d] = f->centre[d] + (c - 0.5f * (cols - 1)) * f->across[d] + (r - 0.5f * (rows - 1)) * f->down[d] +
                       (1 - u) * ((1 - v) * bend[i][j][d] + v * bend[i][j + 1][d]) +
                       u * ((1 - v) * bend[i + 1][j][d] + v * bend[i + 1][j + 1][d]);
            tissue[r * cols + c] = (uint8_t)phantom_ground(p, q[0], q[1], q[2]);
        }
    float normal[3] = {f->across[1] * f->down[2] - f->across[2] * f->down[1], f->across[2] * f->down[0] - f->across[0] * f->down[2],
                       f->across[0] * f->down[1] - f->across[1] * f->down[0]};
    float aa = 0, dd = 0, nn = 0;
    for (int d = 0; d < 3; d++) aa += f->across[d] * f->across[d], dd += f->down[d] * f->down[d], nn += normal[d] * normal[d];
    for (int k = 0; k < p->n_parts; k++) {
        const PhantomPart *o = &p->parts[k];
        // The part's box in the image: its centre's row and column, and how far its radii (and the bending) can reach.
        float apart[3] = {o->x - f->centre[0], o->y - f->centre[1], o->z - f->centre[2]},
              reach[3] = {o->rx + 14, o->ry + 14, o->rz + 14};
        float col = 0, row = 0, off = 0, wide = 0, high = 0, thick = 0;
        for (int d = 0; d < 3; d++) {
            col += apart[d] * f->across[d] / aa, wide += reach[d] * fabsf(f->across[d]) / aa;
            row += apart[d] * f->down[d] / dd, high += reach[d] * fabsf(f->down[d]) / dd;
            off += apart[d] * normal[d], thick += reach[d] * fabsf(normal[d]);
        }
        if (fabsf(off) > thick) continue;
        col += 0.5f * (cols - 1), row += 0.5f * (rows - 1);
        int r0 = (int)fmaxf(0, floorf(row - high)), r1 = (int)fminf(rows - 1, ceilf(row + high)),
            c0 = (int)fmaxf(0, floorf(col - wide)), c1 = (int)fminf(cols - 1, ceilf(col + wide));
        float ix = 1 / o->rx, iy = 1 / o->ry, iz = 1 / o->rz, inner = o->inner * o->inner,
              wave = o->texture ? 6.2832f / o->texture : 0;
        for (int r = r0; r <= r1; r++)
            for (int c = c0; c <= c1; c++) {
                const float *q = &at[3 * (r * cols + c)];
                float x = q[0] - o->x, y = q[1] - o->y, z = q[2] - o->z, u = x * ix, v = y * iy, w = z * iz;
                float square = u * u + v * v + (o->tube ? 0 : w * w);
                uint8_t *t = &tissue[r * cols + c];
                if (square > 1 || square < inner || w > 1 || w < -1 || x * o->clip_x + y * o->clip_y < 0 || !(o->over >> *t & 1))
                    continue;
                int paint = o->tissue;
                if (wave && sinf(x * wave + 2 * sinf(z * 0.11f + y * 0.05f)) * sinf(y * wave + 2 * sinf(x * 0.07f)) > 0.45f)
                    paint = o->other ? o->other : T_FAT;
                *t = (uint8_t)paint;
            }
    }
}

// One value per tissue for a volume: HU, or an MR sequence's signal.
static inline void phantom_contrast(Rng *r, int modality, float value[PHANTOM_TISSUES]) {
    if (modality == MODALITY_CT) {
        double contrast = rng_uniform(r) < 0.5 ? 0 : rng_range(r, 60, 320), late = rng_uniform(r), bone = rng_range(r, 0.55, 1.35);
        for (int t = 0; t < PHANTOM_TISSUES; t++)
            value[t] = phantom_tissue[t].hu + (float)((t == T_AIR || t == T_GAS ? 4 : 9) * rng_normal(r));
        value[T_BLOOD] += (float)(contrast * (1 - 0.5 * late));
        value[T_HEART] += (float)(0.3 * contrast);
        value[T_KIDNEY] += (float)(0.7 * contrast);
        value[T_SPLEEN] += (float)(0.4 * contrast);
        value[T_LIVER] += (float)(0.3 * late * contrast + 12 * rng_normal(r));
        value[T_GLAND] += (float)(0.35 * contrast);
        value[T_BOWEL] += (float)(0.2 * contrast);
        value[T_FLUID] += (float)(rng_uniform(r) < 0.15 ? late * contrast : 0);
        value[T_LUNG] += (float)(55 * rng_normal(r));
        value[T_BONE] *= (float)bone;
        value[T_MARROW] *= (float)bone;
        return;
    }
    double weighting = rng_range(r, -0.15, 1.15), scanner = exp(rng_range(r, log(120), log(2600)));
    double fat = rng_uniform(r) < 0.3 ? rng_range(r, 0.05, 0.3) : 1, fluid = rng_uniform(r) < 0.25 ? 0.12 : 1,
           blood = rng_uniform(r) < 0.35 ? rng_range(r, 2, 5) : 1;
    for (int t = 0; t < PHANTOM_TISSUES; t++) {
        double s = (1 - weighting) * phantom_tissue[t].t1 + weighting * phantom_tissue[t].t2;
        s *= exp(0.22 * rng_normal(r)) * (t == T_FAT || t == T_CAVITY || t == T_MARROW ? fat
                                          : t == T_FLUID                               ? fluid
                                          : t == T_BLOOD                               ? blood
                                                                                       : 1);
        value[t] = (float)(scanner * fmax(s, 0.005));
    }
}

// Nearly normal, from one random word: the sum of its four bytes.
static inline float phantom_noise(Rng *r) {
    uint32_t w = rng_word(r);
    return ((float)((w & 255) + (w >> 8 & 255) + (w >> 16 & 255) + (w >> 24)) - 510) * (1 / 147.8f);
}

typedef struct {
    float value[PHANTOM_TISSUES], noise, bias[5], table, circle;
    int modality, smooth_noise;
} PhantomScan;

// How a scanner shows one volume: contrast, noise, bias field, table, padding outside the reconstructed circle.
static inline PhantomScan phantom_scan(Rng *r, int modality) {
    PhantomScan s = {.modality = modality};
    phantom_contrast(r, modality, s.value);
    s.noise = (float)exp(modality == MODALITY_CT ? rng_range(r, log(8), log(55))
                                                 : log(s.value[T_MUSCLE] + s.value[T_FAT]) + rng_range(r, log(0.01), log(0.07)));
    for (int i = 0; i < 5; i++) s.bias[i] = modality == MODALITY_MR ? (float)rng_range(r, -0.4, 0.4) : 0;
    s.table = modality == MODALITY_CT && rng_uniform(r) < 0.7 ? (float)rng_range(r, 4, 40) : -1;
    s.circle = modality == MODALITY_CT && rng_uniform(r) < 0.4 ? (float)rng_range(r, 0.98, 1.1) : 9;
    s.smooth_noise = rng_uniform(r) < 0.5;
    return s;
}

static inline void phantom_blur(float *image, int rows, int cols, float *scratch) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++)
            scratch[r * cols + c] =
                0.5f * image[r * cols + c] +
                0.25f * (image[r * cols + (c ? c - 1 : 0)] + image[r * cols + (c < cols - 1 ? c + 1 : c)]);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++)
            image[r * cols + c] = 0.5f * scratch[r * cols + c] +
                                  0.25f * (scratch[(r ? r - 1 : 0) * cols + c] + scratch[(r < rows - 1 ? r + 1 : r) * cols + c]);
}

// Tissue to integer values as they are stored: image, scratch [rows][cols].
static inline void phantom_render(const PhantomScan *s, Rng *r, int rows, int cols, const uint8_t *tissue, float *image,
                                  float *scratch) {
    int n = rows * cols;
    for (int i = 0; i < n; i++) {
        float y = 2.0f * (i / cols) / rows - 1, x = 2.0f * (i % cols) / cols - 1;
        float field = 1 + s->bias[0] * x + s->bias[1] * y + s->bias[2] * x * y + s->bias[3] * (x * x - 0.3f) +
                      s->bias[4] * (y * y - 0.3f);
        image[i] = s->value[tissue[i]] * (field > 0.15f ? field : 0.15f) +
                   (s->smooth_noise ? 1.7f * s->noise * phantom_noise(r) : 0);
    }
    phantom_blur(image, rows, cols, scratch);
    for (int i = 0; i < n; i++) {
        float y = 2.0f * (i / cols) / rows - 1, x = 2.0f * (i % cols) / cols - 1, v = image[i];
        if (!s->smooth_noise) v += s->noise * phantom_noise(r);
        if (s->modality == MODALITY_MR) {
            float other = s->noise * phantom_noise(r);
            v = sqrtf(v * v + other * other);
        } else if (x * x + y * y > s->circle * s->circle) {
            v = -1024;
        } else if (v < -1024) {
            v = -1024;
        }
        image[i] = rintf(fminf(v, 30000));
    }
}

// Where a region lies along the body, mm from the vertex.
static const float phantom_range[PHANTOM_REGIONS][2] = {{30, 190}, {222, 298}, {345, 565}, {605, 810}, {865, 1015}, {1080, 1650}};

// The plane of slice `number` of `count` of one volume. `view` is the volume's own draws: the same for all its slices.
static inline PhantomPlane phantom_plane(const PhantomBody *p, Rng view, int region, int plane, int number, int count, int rows,
                                         int cols) {
    Rng *r = &view;
    float from = phantom_range[region][0], to = phantom_range[region][1];
    float jitter = (float)rng_range(r, 0, 1), z = from + (to - from) * (number + jitter) / count;
    const PhantomLevel *middle = &p->levels[(int)(0.5f * (from + to)) / PHANTOM_STEP];
    float half = region == REGION_LIMB ? p->leg_x + 75 : middle->a, deep = region == REGION_LIMB ? 80 : middle->b;
    float x = 0, y = 0, field = 2 * fmaxf(half, deep);
    if (plane == PLANE_AXIAL && region == REGION_LIMB && rng_uniform(r) < 0.65) {
        x = rng_uniform(r) < 0.5 ? p->leg_x : -p->leg_x;
        field = 175;
    }
    if (plane != PLANE_AXIAL) {
        float offset = (float)(count > 1 ? number - 0.5 * (count - 1) : 0) * 22 + (float)rng_range(r, -14, 14);
        z = 0.5f * (from + to) + (float)rng_range(r, -0.2, 0.2) * (to - from);
        field = fmaxf(0.75f * (to - from) + 60, 170);
        if (plane == PLANE_CORONAL) y = offset;
        else x = region == REGION_LIMB ? (rng_uniform(r) < 0.5 ? 1 : -1) * p->leg_x + 0.5f * offset : offset;
    }
    field *= (float)exp(rng_range(r, log(0.78), log(1.5)));
    float pixel = field / (rows < cols ? rows : cols);
    double turn = 0.15 * rng_normal(r), tilt = 0.12 * rng_normal(r), lean = 0.08 * rng_normal(r);
    float shift_u = (float)rng_range(r, -0.12, 0.12) * field, shift_v = (float)rng_range(r, -0.12, 0.12) * field;
    // The plane's own axes, then a turn within it and two small tilts out of it.
    static const int axes[PLANE_COUNT][3] = {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}};
    int u = axes[plane][0], v = axes[plane][1], w = axes[plane][2];
    PhantomPlane f = {{x, y, z}, {0}, {0}};
    f.across[u] = (float)(cos(turn) * cos(lean)), f.across[v] = (float)sin(turn), f.across[w] = (float)(cos(turn) * sin(lean));
    f.down[u] = (float)-sin(turn), f.down[v] = (float)(cos(turn) * cos(tilt)), f.down[w] = (float)(cos(turn) * sin(tilt));
    for (int d = 0; d < 3; d++) {
        f.centre[d] += f.across[d] * shift_u + f.down[d] * shift_v;
        f.across[d] *= pixel, f.down[d] *= pixel;
    }
    return f;
}

// The table under the patient, a shallow arc `below` mm behind the body, where the air is.
static inline void phantom_table(const PhantomBody *p, float below, const float *at, int n, uint8_t *tissue) {
    float back = 0;
    for (int i = 300 / PHANTOM_STEP; i < PHANTOM_CROTCH / PHANTOM_STEP; i += 20)
        back = fmaxf(back, p->levels[i].y + p->levels[i].b);
    for (int i = 0; i < n; i++) {
        float y = at[3 * i + 1] - back - below + at[3 * i] * at[3 * i] / 1500;
        if (tissue[i] == T_AIR && at[3 * i] > -230 && at[3 * i] < 230 && (fabsf(y) < 3 || fabsf(y - 30) < 3)) tissue[i] = T_TABLE;
    }
}

// Adds the slices of one volume (one patient, modality, region and plane) to a shard.
static inline void phantom_volume(ShardWriter *w, const PhantomBody *p, uint64_t seed, uint64_t patient, int modality, int region,
                                  int plane, int count) {
    uint32_t which = 1 + (uint32_t)((modality * PHANTOM_REGIONS + region) * PLANE_COUNT + plane);
    Rng r = rng_at(seed, RNG_PHANTOM, 1, patient, which);
    int cols = 112 + 8 * (int)rng_below(&r, 5), rows = rng_uniform(&r) < 0.6 ? cols : cols - 8 * (int)rng_below(&r, 4),
        n = rows * cols;
    PhantomScan scan = phantom_scan(&r, modality);
    Rng view = rng_at(seed, RNG_PHANTOM, 2, patient, which);
    float *images = (float *)xmalloc(sizeof(float) * n * count, "a phantom volume"),
          *at = (float *)xmalloc(sizeof(float) * 3 * n, "a phantom volume");
    uint8_t *tissue = (uint8_t *)xmalloc(n, "a phantom volume");
    int16_t *pixels = (int16_t *)xmalloc(sizeof(int16_t) * n * count, "a phantom volume");
    Moments plain = {0}, clipped = {0};
    float pixel = 1;
    for (int i = 0; i < count; i++) {
        PhantomPlane f = phantom_plane(p, view, region, plane, i, count, rows, cols);
        if (i == 0) pixel = p->scale * sqrtf(f.across[0] * f.across[0] + f.across[1] * f.across[1] + f.across[2] * f.across[2]);
        phantom_sample(p, &f, rows, cols, tissue, at);
        if (scan.table >= 0) phantom_table(p, scan.table, at, n, tissue);
        phantom_render(&scan, &r, rows, cols, tissue, images + i * n, at);
        for (int j = i * n; j < (i + 1) * n; j++) pixels[j] = (int16_t)images[j];
        moments_add(&plain, pixels + i * n, n, 1, 0, -INFINITY);
        moments_add(&clipped, pixels + i * n, n, 1, 0, -1000);
    }
    float threshold = anatomy_threshold(images, (size_t)n * count, modality);
    uint64_t name[5] = {seed, patient, (uint64_t)modality, (uint64_t)region, (uint64_t)plane};
    ShardSlice s = {.volume_id = checksum(name, sizeof name),
                    .patient_id = checksum(name, 16),
                    .rows = rows,
                    .cols = cols,
                    .volume_slices = count,
                    .spacing_row = pixel,
                    .spacing_col = pixel,
                    .scale = 1,
                    .modality = (uint8_t)modality,
                    .plane = (uint8_t)plane,
                    .label = region,
                    .target = NAN,
                    .volume_mean = (float)plain.mean,
                    .volume_std = (float)moments_std(&plain),
                    .volume_mean_clipped = (float)clipped.mean,
                    .volume_std_clipped = (float)moments_std(&clipped)};
    s.spacing_slice = p->scale * (plane == PLANE_AXIAL ? (phantom_range[region][1] - phantom_range[region][0]) / count : 22);
    for (int i = 0; i < count; i++) {
        s.slice_number = i;
        slice_anatomy(pixels + i * n, rows, cols, 1, 0, threshold, &s);
        shard_writer_add(w, &s, pixels + i * n, NULL);
    }
    free(images);
    free(at);
    free(tissue);
    free(pixels);
}

// Writes DIR/phantom.shard with patients first_patient .. first_patient+patients-1 of this seed: for each, a CT and an MR
// of every region, two axial slices each, and for half of these also one coronal or sagittal slice. Makes DIR. Fails with
// status 1.
static inline void phantom_make(const char *dir, uint64_t seed, int patients, int first_patient) {
    char path[4096];
    if (mkdir(dir, 0777) && errno != EEXIST) fail(STATUS_FAILED, "%s: cannot be made: %s", dir, strerror(errno));
    snprintf(path, sizeof path, "%s/phantom.shard", dir);
    ShardWriter w;
    shard_writer_open(&w, path);
    PhantomBody *p = (PhantomBody *)xmalloc(sizeof *p, "a phantom");
    for (int i = first_patient; i < first_patient + patients; i++) {
        phantom_body(p, seed, (uint64_t)i);
        for (int modality = MODALITY_CT; modality <= MODALITY_MR; modality++)
            for (int region = 0; region < PHANTOM_REGIONS; region++) {
                phantom_volume(&w, p, seed, (uint64_t)i, modality, region, PLANE_AXIAL, 2);
                Rng other = rng_at(seed, RNG_PHANTOM, 3, (uint64_t)i, (uint32_t)(modality * PHANTOM_REGIONS + region));
                int plane = (int)rng_below(&other, 4);
                if (plane == PLANE_CORONAL || plane == PLANE_SAGITTAL)
                    phantom_volume(&w, p, seed, (uint64_t)i, modality, region, plane, 1);
            }
    }
    free(p);
    shard_writer_close(&w, phantom_classes);
}

enum { PHANTOM_PATIENTS = 150, PHANTOM_SEED = 1 };     // the default set: about 7500 slices

// DIR/train with `patients` patients and DIR/eval with two thirds as many others. Makes DIR. Fails with status 1.
static inline void phantom_make_sets(const char *dir, uint64_t seed, int patients) {
    char path[4096];
    if (mkdir(dir, 0777) && errno != EEXIST) fail(STATUS_FAILED, "%s: cannot be made: %s", dir, strerror(errno));
    snprintf(path, sizeof path, "%s/train", dir);
    phantom_make(path, seed, patients, 0);
    snprintf(path, sizeof path, "%s/eval", dir);
    phantom_make(path, seed, patients * 2 / 3, patients);
}

#ifndef __clang__
#pragma GCC pop_options
#endif

#endif
