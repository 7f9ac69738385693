/* SPDX-License-Identifier: Apache-2.0
 *
 * rescale IN.ppm OUT.ppm UP DOWN: rescale a picture by UP/DOWN, in plain C99 with libcarafepp alone.
 *
 * A bilateral filter stands for the network that would predict logits. The logit of a tap falls with its distance from
 * the output, and with its difference in colour from the source. So edges stay sharp.
 */
#include <carafepp/carafepp.h>
#include <stdio.h>
#include <stdlib.h>

enum { C = 3, K = 5 };
static const double DISTANCE = 0.6; /* source pixels, or output pixels if these are larger */
static const double COLOUR = 30.0;  /* levels of 255 */

/* A picture holds rows of pixels of three floats. Strides give it the axes N, C, H, W. */
static carafepp_tensor picture(float* data, int64_t h, int64_t w) {
    carafepp_tensor tensor = {data, CARAFEPP_FLOAT32, CARAFEPP_CPU, 0, 4, {1, C, h, w}, {h * w * C, 1, w * C, C}};
    return tensor;
}

static int fail(const char* what) {
    fprintf(stderr, "rescale: %s\n", what);
    return EXIT_FAILURE;
}

static float* read_picture(const char* name, int* h, int* w) {
    FILE* file = fopen(name, "rb");
    if (!file) return NULL;
    float* pixels = NULL;
    if (fscanf(file, "P6 %d %d 255", w, h) == 2 && fgetc(file) != EOF && *w > 0 && *h > 0) {
        const size_t count = (size_t)*h * (size_t)*w * C;
        pixels = malloc(count * sizeof *pixels);
        for (size_t i = 0; pixels && i < count; ++i) {
            const int byte = fgetc(file);
            if (byte == EOF) {
                free(pixels);
                pixels = NULL;
            } else {
                pixels[i] = (float)byte;
            }
        }
    }
    fclose(file);
    return pixels;
}

static int write_picture(const char* name, const float* pixels, int64_t h, int64_t w) {
    FILE* file = fopen(name, "wb");
    if (!file) return 0;
    fprintf(file, "P6\n%lld %lld\n255\n", (long long)w, (long long)h);
    for (int64_t i = 0; i < h * w * C; ++i) {
        const float value = pixels[i] < 0 ? 0 : pixels[i] > 255 ? 255 : pixels[i];
        fputc((int)(value + 0.5f), file);
    }
    return fclose(file) == 0;
}

/* The logit of tap (a, b) for the output pixel (y, x). */
static double logit(const float* pixels, int h, int w, int up, int down, int64_t y, int64_t x, int a, int b) {
    const int64_t i = y * down / up, j = x * down / up; /* the source */
    const int64_t ta = i + a, tb = j + b;
    if (ta < 0 || ta >= h || tb < 0 || tb >= w) return -1e4; /* no weight beyond the border */
    const double step = down > up ? (double)down / up : 1;
    const double dy = ((double)y + 0.5) * down / up - 0.5 - (double)ta;
    const double dx = ((double)x + 0.5) * down / up - 0.5 - (double)tb;
    double difference = 0;
    for (int c = 0; c < C; ++c) {
        const double d = pixels[(ta * w + tb) * C + c] - pixels[(i * w + j) * C + c];
        difference += d * d;
    }
    return -(dy * dy + dx * dx) / (2 * DISTANCE * DISTANCE * step * step) - difference / (2 * COLOUR * COLOUR);
}

int main(int argc, char** argv) {
    if (argc != 5) return fail("usage: rescale IN.ppm OUT.ppm UP DOWN");
    int h, w;
    float* pixels = read_picture(argv[1], &h, &w);
    if (!pixels) return fail("the first file is not a binary PPM of 8 bits");

    carafepp_params params = {0};
    params.struct_size = sizeof params;
    params.up = atoi(argv[3]);
    params.down = atoi(argv[4]);
    params.kernel_size = K;
    params.groups = 1;
    params.normalizer = CARAFEPP_SOFTMAX;

    const carafepp_tensor features = picture(pixels, h, w);
    int64_t shape[4];
    if (carafepp_output_shape(&params, CARAFEPP_REASSEMBLE_WITH_LOGITS, &features, shape)) {
        return fail(carafepp_last_error());
    }
    const int64_t out_h = shape[2], out_w = shape[3];
    const int up = params.up, down = params.down;

    /* Channel t*up*up + dy*up + dx at (p, q) is the logit of tap t for output (p*up + dy, q*up + dx). */
    const int64_t rows = (h + down - 1) / down, columns = (w + down - 1) / down;
    const int64_t plane = rows * columns, channels = (int64_t)K * K * up * up;
    float* values = malloc((size_t)(channels * plane) * sizeof *values);
    float* rescaled = malloc((size_t)(out_h * out_w * C) * sizeof *rescaled);
    if (!values || !rescaled) return fail("no memory");
    for (int64_t channel = 0; channel < channels; ++channel) {
        const int t = (int)(channel / (up * up)), dy = (int)(channel / up % up), dx = (int)(channel % up);
        for (int64_t cell = 0; cell < plane; ++cell) {
            const int64_t y = cell / columns * up + dy, x = cell % columns * up + dx;
            values[channel * plane + cell] = (float)logit(pixels, h, w, up, down, y, x, t / K - K / 2, t % K - K / 2);
        }
    }

    const carafepp_tensor logits = {values,
                                    CARAFEPP_FLOAT32,
                                    CARAFEPP_CPU,
                                    0,
                                    4,
                                    {1, channels, rows, columns},
                                    {channels * plane, plane, columns, 1}};
    const carafepp_tensor output = picture(rescaled, out_h, out_w);
    if (carafepp_reassemble_with_logits(&params, &features, &logits, &output, NULL)) {
        return fail(carafepp_last_error());
    }
    if (!write_picture(argv[2], rescaled, out_h, out_w)) return fail("the second file cannot be written");
    printf("%dx%d to %lldx%lld by carafepp %s\n", w, h, (long long)out_w, (long long)out_h, carafepp_version());
    free(pixels);
    free(values);
    free(rescaled);
    return EXIT_SUCCESS;
}
