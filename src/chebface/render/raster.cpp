// Z-buffer rasteriser over triangles in pixel coordinates: the fast half of raster.py, which defines every function.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr float kInside = -1e-6f;  // keep equal to INSIDE in raster.py: closes cracks along shared edges

struct Edges {  // barycentrics of the pixel (x, y): b1 = e1x*(x-x0) + e1y*(y-y0), b2 likewise, b0 = 1-b1-b2
    float x0, y0, e1x, e1y, e2x, e2y;
};

bool edges(const float* p0, const float* p1, const float* p2, Edges* e) {
    const double ax = double(p1[0]) - p0[0], ay = double(p1[1]) - p0[1];
    const double bx = double(p2[0]) - p0[0], by = double(p2[1]) - p0[1];
    const double area = ax * by - ay * bx;
    if (!(std::fabs(area) > 1e-12 && std::fabs(area) < 1e30)) return false;
    e->x0 = p0[0];
    e->y0 = p0[1];
    e->e1x = float(by / area);
    e->e1y = float(-bx / area);
    e->e2x = float(-ay / area);
    e->e2y = float(ax / area);
    return true;
}

}  // namespace

extern "C" {

// points (n, 3) [x_px, y_px, depth], faces (m, 3) -> triangle (h, w), barycentric (h, w, 3)
void rasterize(const float* points, const int32_t* faces, int64_t m, int32_t h, int32_t w, int32_t* triangle,
               float* barycentric) {
    std::vector<float> nearest(size_t(h) * w, std::numeric_limits<float>::infinity());
    std::fill(triangle, triangle + size_t(h) * w, -1);
    for (int64_t t = 0; t < m; ++t) {
        const float* p0 = points + 3 * size_t(faces[3 * t]);
        const float* p1 = points + 3 * size_t(faces[3 * t + 1]);
        const float* p2 = points + 3 * size_t(faces[3 * t + 2]);
        const float left = std::min({p0[0], p1[0], p2[0]}), right = std::max({p0[0], p1[0], p2[0]});
        const float top = std::min({p0[1], p1[1], p2[1]}), bottom = std::max({p0[1], p1[1], p2[1]});
        if (!(right >= 0 && left <= float(w - 1) && bottom >= 0 && top <= float(h - 1))) continue;
        Edges e;
        if (!edges(p0, p1, p2, &e)) continue;
        const int xa = int(std::ceil(std::max(0.0f, left))), xb = int(std::floor(std::min(float(w - 1), right)));
        const int ya = int(std::ceil(std::max(0.0f, top))), yb = int(std::floor(std::min(float(h - 1), bottom)));
        const float d1 = p1[2] - p0[2], d2 = p2[2] - p0[2];
        for (int y = ya; y <= yb; ++y) {
            const float dy = float(y) - e.y0;
            float* depth_row = nearest.data() + size_t(y) * w;
            int32_t* triangle_row = triangle + size_t(y) * w;
            for (int x = xa; x <= xb; ++x) {
                const float dx = float(x) - e.x0;
                const float b1 = e.e1x * dx + e.e1y * dy, b2 = e.e2x * dx + e.e2y * dy, b0 = 1.0f - b1 - b2;
                if (b0 < kInside || b1 < kInside || b2 < kInside) continue;
                const float depth = p0[2] + b1 * d1 + b2 * d2;
                if (depth < depth_row[x]) {
                    depth_row[x] = depth;
                    triangle_row[x] = int32_t(t);
                }
            }
        }
    }
    for (int y = 0; y < h; ++y) {
        for (int x = 0; x < w; ++x) {
            const size_t i = size_t(y) * w + x;
            float* b = barycentric + 3 * i;
            const int32_t t = triangle[i];
            if (t < 0) {
                b[0] = b[1] = b[2] = 0;
                continue;
            }
            Edges e;
            edges(points + 3 * size_t(faces[3 * t]), points + 3 * size_t(faces[3 * t + 1]),
                  points + 3 * size_t(faces[3 * t + 2]), &e);
            const float dx = float(x) - e.x0, dy = float(y) - e.y0;
            b[1] = e.e1x * dx + e.e1y * dy;
            b[2] = e.e2x * dx + e.e2y * dy;
            b[0] = 1.0f - b[1] - b[2];
        }
    }
}

// attributes (n, c) at the vertices -> image (pixels, c); zero where no triangle is
void interpolate(const float* attributes, int64_t c, const int32_t* faces, const int32_t* triangle,
                 const float* barycentric, int64_t pixels, float* image) {
    for (int64_t i = 0; i < pixels; ++i) {
        float* out = image + i * c;
        const int32_t t = triangle[i];
        if (t < 0) {
            std::fill(out, out + c, 0.0f);
            continue;
        }
        const float* a0 = attributes + c * faces[3 * size_t(t)];
        const float* a1 = attributes + c * faces[3 * size_t(t) + 1];
        const float* a2 = attributes + c * faces[3 * size_t(t) + 2];
        const float b0 = barycentric[3 * i], b1 = barycentric[3 * i + 1], b2 = barycentric[3 * i + 2];
        for (int64_t k = 0; k < c; ++k) out[k] = b0 * a0[k] + b1 * a1[k] + b2 * a2[k];
    }
}

// Adds to grad_attributes (n, c) and to the x, y of grad_points (n, 3); both come in zeroed.
void interpolate_backward(const float* points, const float* attributes, int64_t c, const int32_t* faces,
                          const int32_t* triangle, const float* barycentric, int64_t pixels,
                          const float* grad_image, float* grad_attributes, float* grad_points) {
    for (int64_t i = 0; i < pixels; ++i) {
        const int32_t t = triangle[i];
        if (t < 0) continue;
        const int32_t* f = faces + 3 * size_t(t);
        const float* g = grad_image + i * c;
        const float* b = barycentric + 3 * i;
        float g1 = 0, g2 = 0;  // d loss / d b1, d b2 with b0 = 1 - b1 - b2
        for (int64_t k = 0; k < c; ++k) {
            const float a0 = attributes[c * f[0] + k];
            g1 += g[k] * (attributes[c * f[1] + k] - a0);
            g2 += g[k] * (attributes[c * f[2] + k] - a0);
            for (int j = 0; j < 3; ++j) grad_attributes[c * f[j] + k] += b[j] * g[k];
        }
        Edges e;
        if (!edges(points + 3 * size_t(f[0]), points + 3 * size_t(f[1]), points + 3 * size_t(f[2]), &e)) continue;
        // The attribute field is linear over the triangle: moving corner j by d moves the field by -b_j * slope * d.
        const float slope_x = g1 * e.e1x + g2 * e.e2x, slope_y = g1 * e.e1y + g2 * e.e2y;
        for (int j = 0; j < 3; ++j) {
            grad_points[3 * size_t(f[j])] -= b[j] * slope_x;
            grad_points[3 * size_t(f[j]) + 1] -= b[j] * slope_y;
        }
    }
}

}  // extern "C"
