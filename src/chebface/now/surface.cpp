// Nearest points of a triangle mesh, and the normal equations of laying it on points: surface.py has the definition.
//
// A tree whose nodes have eight children, and whose leaves have eight triangles, so that the loops over both become
// vector instructions. A query starts from a triangle that is likely near (that of the same point one step earlier, or
// that of the point before): most of the tree is then never seen. All in float64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int kWide = 8;
constexpr double kFar = std::numeric_limits<double>::infinity();

struct Node {
    double low[3][kWide], high[3][kWide];
    int32_t child[kWide];  // a node, or ~leaf
};

struct Leaf {
    double a[3][kWide], ab[3][kWide], ac[3][kWide], bc[3][kWide], normal[3][kWide];
    double ab2[kWide], ac2[kWide], bc2[kWide];              // one over the squared length; 0 for none
    double row1[3][kWide], row2[3][kWide];                  // barycentrics of the foot: row . (p - a); NaN without area
    int64_t triangle[kWide];                                // -1 pads
};

struct Point {
    double x[3];
};

double dot(const Point& p, const Point& q) { return p.x[0] * q.x[0] + p.x[1] * q.x[1] + p.x[2] * q.x[2]; }
Point minus(const Point& p, const Point& q) { return {{p.x[0] - q.x[0], p.x[1] - q.x[1], p.x[2] - q.x[2]}}; }
Point cross(const Point& p, const Point& q) {
    return {{p.x[1] * q.x[2] - p.x[2] * q.x[1], p.x[2] * q.x[0] - p.x[0] * q.x[2], p.x[0] * q.x[1] - p.x[1] * q.x[0]}};
}
double inverse(double value) { return value > 0 ? 1 / value : 0; }
double gap(double low, double x, double high) {
    const double under = low - x, over = x - high, most = under > over ? under : over;
    return most > 0 ? most : 0;
}
double clamp01(double t) { return t < 0 ? 0 : t > 1 ? 1 : t; }

class Surface {
public:
    Surface(const double* vertices, const int64_t* faces, int64_t count) : vertices_(vertices), faces_(faces) {
        order_.resize(count);
        middle_.resize(count);
        where_.resize(count);
        for (int64_t f = 0; f < count; ++f) {
            order_[f] = f;
            for (int c = 0; c < 3; ++c) middle_[f].x[c] = corner(f, 0).x[c] + corner(f, 1).x[c] + corner(f, 2).x[c];
        }
        double box[6];
        root_ = build(0, count, box);
        order_.clear(), middle_.clear();
    }

    // Squared distance to one leaf, and the place (leaf * 8 + lane) there.
    double find_in_leaf(const Point& p, int64_t& slot) const {
        return see_leaf(leaves_[slot / kWide], p, slot / kWide, slot);
    }

    // Squared distance; slot starts as a guess or -1 and ends as the answer. Every leaf but the answer's is at least
    // `other` away, squared.
    double find(const Point& p, int64_t& slot, double& other) const {
        double best = slot >= 0 ? find_in_leaf(p, slot) : kFar;
        int32_t leaf = slot >= 0 ? ~static_cast<int32_t>(slot / kWide) : 0;
        other = kFar;
        double closed[kWide];
        std::fill(closed, closed + kWide, kFar);
        struct Waiting {
            double distance;
            int32_t child;
        } stack[256];
        int top = 0;
        stack[top++] = {0, root_};
        while (top) {
            const Waiting now = stack[--top];
            if (now.distance >= best) {
                other = std::min(other, now.distance);
                continue;
            }
            if (now.child < 0) {
                if (now.child == leaf) continue;
                int64_t at = 0;
                const double found = see_leaf(leaves_[~now.child], p, ~now.child, at);
                other = std::min(other, std::max(found, best));
                if (found < best) best = found, slot = at, leaf = now.child;
                continue;
            }
            const Node& node = nodes_[now.child];
            double distance[kWide];
            for (int k = 0; k < kWide; ++k) {
                const double x = gap(node.low[0][k], p.x[0], node.high[0][k]);
                const double y = gap(node.low[1][k], p.x[1], node.high[1][k]);
                const double z = gap(node.low[2][k], p.x[2], node.high[2][k]);
                distance[k] = x * x + y * y + z * z;
                closed[k] = distance[k] >= best && distance[k] < closed[k] ? distance[k] : closed[k];
            }
            uint32_t open = 0;
            for (int k = 0; k < kWide; ++k) open |= static_cast<uint32_t>(distance[k] < best) << k;
            const int first = top;
            for (; open; open &= open - 1) {
                const int k = __builtin_ctz(open);
                int at = top++;  // the nearest on top
                for (; at > first && stack[at - 1].distance < distance[k]; --at) stack[at] = stack[at - 1];
                stack[at] = {distance[k], node.child[k]};
            }
        }
        for (int k = 0; k < kWide; ++k) other = std::min(other, closed[k]);
        return best;
    }

    Point closest(const Point& p, int64_t slot) const {
        const Leaf& leaf = leaves_[slot / kWide];
        const int k = slot % kWide;
        const auto lane = [k](const double(&rows)[3][kWide]) { return Point{{rows[0][k], rows[1][k], rows[2][k]}}; };
        const Point a = lane(leaf.a), ab = lane(leaf.ab), ac = lane(leaf.ac), bc = lane(leaf.bc), ap = minus(p, a);
        const double v = dot(lane(leaf.row1), ap), w = dot(lane(leaf.row2), ap);
        Point foot;
        if (v >= 0 && w >= 0 && v + w <= 1) {
            for (int c = 0; c < 3; ++c) foot.x[c] = a.x[c] + v * ab.x[c] + w * ac.x[c];
            return foot;
        }
        double best = kFar;
        const auto edge = [&](const Point& from, const Point& along, double over) {
            const double t = clamp01(dot(along, minus(p, from)) * over);
            Point q;
            for (int c = 0; c < 3; ++c) q.x[c] = from.x[c] + t * along.x[c];
            const double distance = dot(minus(p, q), minus(p, q));
            if (distance < best) best = distance, foot = q;
        };
        const Point b = {{a.x[0] + ab.x[0], a.x[1] + ab.x[1], a.x[2] + ab.x[2]}};
        edge(a, ab, leaf.ab2[k]);
        edge(a, ac, leaf.ac2[k]);
        edge(b, bc, leaf.bc2[k]);
        return foot;
    }

    Point normal(int64_t slot) const {
        const Leaf& leaf = leaves_[slot / kWide];
        const int k = slot % kWide;
        return {{leaf.normal[0][k], leaf.normal[1][k], leaf.normal[2][k]}};
    }
    int64_t triangle(int64_t slot) const { return leaves_[slot / kWide].triangle[slot % kWide]; }
    int64_t slot(int64_t triangle) const { return where_[triangle]; }

private:
    Point corner(int64_t f, int c) const {
        const double* v = vertices_ + 3 * faces_[3 * f + c];
        return {{v[0], v[1], v[2]}};
    }

    static double see_leaf(const Leaf& leaf, const Point& p, int64_t index, int64_t& slot) {
        double found[kWide];
        for (int k = 0; k < kWide; ++k) {
            const double x = p.x[0] - leaf.a[0][k], y = p.x[1] - leaf.a[1][k], z = p.x[2] - leaf.a[2][k];
            const double abx = leaf.ab[0][k], aby = leaf.ab[1][k], abz = leaf.ab[2][k];
            const double acx = leaf.ac[0][k], acy = leaf.ac[1][k], acz = leaf.ac[2][k];
            const double bcx = leaf.bc[0][k], bcy = leaf.bc[1][k], bcz = leaf.bc[2][k];
            const double s = clamp01((x * abx + y * aby + z * abz) * leaf.ab2[k]);
            const double t = clamp01((x * acx + y * acy + z * acz) * leaf.ac2[k]);
            const double bx = x - abx, by = y - aby, bz = z - abz;
            const double u = clamp01((bx * bcx + by * bcy + bz * bcz) * leaf.bc2[k]);
            const double sx = x - s * abx, sy = y - s * aby, sz = z - s * abz;
            const double tx = x - t * acx, ty = y - t * acy, tz = z - t * acz;
            const double ux = bx - u * bcx, uy = by - u * bcy, uz = bz - u * bcz;
            const double on_ab = sx * sx + sy * sy + sz * sz, on_ac = tx * tx + ty * ty + tz * tz;
            const double on_bc = ux * ux + uy * uy + uz * uz;
            double edge = on_ab < on_ac ? on_ab : on_ac;
            edge = edge < on_bc ? edge : on_bc;
            const double v = leaf.row1[0][k] * x + leaf.row1[1][k] * y + leaf.row1[2][k] * z;
            const double w = leaf.row2[0][k] * x + leaf.row2[1][k] * y + leaf.row2[2][k] * z;
            const double height = leaf.normal[0][k] * x + leaf.normal[1][k] * y + leaf.normal[2][k] * z;
            found[k] = (v >= 0) & (w >= 0) & (v + w <= 1) ? height * height : edge;
        }
        double nearest = found[0];
        for (int k = 1; k < kWide; ++k) nearest = found[k] < nearest ? found[k] : nearest;
        int lane = 0;
        while (lane < kWide - 1 && found[lane] != nearest) ++lane;
        slot = index * kWide + lane;
        return nearest;
    }

    int32_t build(int64_t from, int64_t to, double* box) {
        if (to - from <= kWide) return make_leaf(from, to, box);
        int64_t cuts[kWide + 1];
        cuts[0] = from, cuts[kWide] = to;
        for (int half = kWide / 2; half; half /= 2)
            for (int k = half; k < kWide; k += 2 * half) cuts[k] = split(cuts[k - half], cuts[k + half], half);
        Node node;
        const int32_t index = static_cast<int32_t>(nodes_.size());
        nodes_.push_back(node);
        for (int c = 0; c < 3; ++c) box[c] = kFar, box[3 + c] = -kFar;
        for (int k = 0; k < kWide; ++k) {
            double inner[6] = {kFar, kFar, kFar, -kFar, -kFar, -kFar};
            node.child[k] = cuts[k] < cuts[k + 1] ? build(cuts[k], cuts[k + 1], inner) : 0;
            for (int c = 0; c < 3; ++c) {  // an empty child is infinitely far
                node.low[c][k] = inner[c], node.high[c][k] = inner[3 + c];
                box[c] = std::min(box[c], inner[c]), box[3 + c] = std::max(box[3 + c], inner[3 + c]);
            }
        }
        nodes_[index] = node;
        return index;
    }

    // Halves by the middle of the widest direction; each half gets whole leaves while there are enough.
    int64_t split(int64_t from, int64_t to, int64_t half) {
        if (to - from < 2) return to;
        double low[3] = {kFar, kFar, kFar}, high[3] = {-kFar, -kFar, -kFar};
        for (int64_t i = from; i < to; ++i)
            for (int c = 0; c < 3; ++c) {
                low[c] = std::min(low[c], middle_[order_[i]].x[c]);
                high[c] = std::max(high[c], middle_[order_[i]].x[c]);
            }
        int axis = 0;
        for (int c = 1; c < 3; ++c)
            if (high[c] - low[c] > high[axis] - low[axis]) axis = c;
        int64_t cut = from + (to - from + 1) / 2;
        if (to - from <= 2 * half * kWide) cut = std::min(to, from + ((cut - from + kWide - 1) / kWide) * kWide);
        if (cut == to) return to;
        std::nth_element(order_.begin() + from, order_.begin() + cut, order_.begin() + to, [&](int64_t f, int64_t g) {
            return middle_[f].x[axis] < middle_[g].x[axis];
        });
        return cut;
    }

    int32_t make_leaf(int64_t from, int64_t to, double* box) {
        Leaf leaf;
        for (int c = 0; c < 3; ++c) box[c] = kFar, box[3 + c] = -kFar;
        for (int k = 0; k < kWide; ++k) {
            const int64_t f = order_[std::min(from + k, to - 1)];
            const Point a = corner(f, 0), b = corner(f, 1), d = corner(f, 2);
            const Point ab = minus(b, a), ac = minus(d, a), bc = minus(d, b), n = cross(ab, ac);
            const double area = dot(n, n), over = area > 0 ? 1 / area : std::nan("");
            const Point row1 = cross(ac, n), row2 = cross(n, ab);
            leaf.triangle[k] = f;
            if (from + k < to) where_[f] = static_cast<int64_t>(leaves_.size()) * kWide + k;
            leaf.ab2[k] = inverse(dot(ab, ab)), leaf.ac2[k] = inverse(dot(ac, ac)), leaf.bc2[k] = inverse(dot(bc, bc));
            for (int c = 0; c < 3; ++c) {
                leaf.a[c][k] = a.x[c], leaf.ab[c][k] = ab.x[c], leaf.ac[c][k] = ac.x[c], leaf.bc[c][k] = bc.x[c];
                leaf.normal[c][k] = area > 0 ? n.x[c] / std::sqrt(area) : 0;
                leaf.row1[c][k] = row1.x[c] * over, leaf.row2[c][k] = row2.x[c] * over;
                box[c] = std::min({box[c], a.x[c], b.x[c], d.x[c]});
                box[3 + c] = std::max({box[3 + c], a.x[c], b.x[c], d.x[c]});
            }
        }
        leaves_.push_back(leaf);
        return ~static_cast<int32_t>(leaves_.size() - 1);
    }

    const double* vertices_;  // both only while building
    const int64_t* faces_;
    std::vector<int64_t> order_, where_;
    std::vector<Point> middle_;
    std::vector<Node> nodes_;
    std::vector<Leaf> leaves_;
    int32_t root_ = 0;
};

}  // namespace

extern "C" {

void* surface_make(const double* vertices, const int64_t* faces, int64_t count) {
    return new Surface(vertices, faces, count);
}

void surface_free(void* surface) { delete static_cast<Surface*>(surface); }

void surface_nearest(const void* given, const double* points, int64_t count, double* closest, int64_t* triangle,
                     double* distance) {
    const Surface& surface = *static_cast<const Surface*>(given);
    int64_t slot = -1;
    double other;
    for (int64_t i = 0; i < count; ++i) {
        const Point p = {{points[3 * i], points[3 * i + 1], points[3 * i + 2]}};
        surface.find(p, slot, other);
        const Point q = surface.closest(p, slot), off = minus(p, q);
        for (int c = 0; c < 3; ++c) closest[3 * i + c] = q.x[c];
        triangle[i] = surface.triangle(slot);
        distance[i] = std::sqrt(dot(off, off));
    }
}

// pose: scale, rotation by rows, translation, centre, arm: 17 numbers. triangle: guesses in (or -1), answers out.
// seen (count, 4): where a point was when the tree was last asked for it, and how far every other leaf was from there.
// While it is nearer to its leaf than its way since then leaves to the others, they need no look.
void surface_linearize(const void* given, const double* points, int64_t count, const double* pose, double still,
                       int64_t* triangle, double* seen, double* distances, double* gradient, double* normal) {
    const Surface& surface = *static_cast<const Surface*>(given);
    const double scale = pose[0], *r = pose + 1, *t = pose + 10, *centre = pose + 13, arm = pose[16];
    double sums[7][8] = {};  // the products of the rows, with the residual as the eighth column
    int64_t slot = -1;
    for (int64_t i = 0; i < count; ++i) {
        const Point x = {{points[3 * i] - t[0], points[3 * i + 1] - t[1], points[3 * i + 2] - t[2]}};
        Point p;
        for (int c = 0; c < 3; ++c) p.x[c] = (r[c] * x.x[0] + r[3 + c] * x.x[1] + r[6 + c] * x.x[2]) / scale;
        bool known = triangle[i] >= 0;
        double* was = seen + 4 * i;
        if (known) {
            slot = surface.slot(triangle[i]);
            const Point way = minus(p, {{was[0], was[1], was[2]}});
            known = std::sqrt(surface.find_in_leaf(p, slot)) + std::sqrt(dot(way, way)) < was[3];
        }
        if (!known) {
            double other;
            surface.find(p, slot, other);
            for (int c = 0; c < 3; ++c) was[c] = p.x[c];
            was[3] = std::sqrt(other);
        }
        const Point q = surface.closest(p, slot), off = minus(p, q);
        const double distance = std::sqrt(dot(off, off));
        triangle[i] = surface.triangle(slot);
        distances[i] = distance * scale;
        Point local = surface.normal(slot);  // on the surface itself, from either side
        if (distance > still)
            for (int c = 0; c < 3; ++c) local.x[c] = off.x[c] / distance;
        Point d, arms;
        for (int c = 0; c < 3; ++c) {
            d.x[c] = r[3 * c] * local.x[0] + r[3 * c + 1] * local.x[1] + r[3 * c + 2] * local.x[2];
            const double y = scale * (r[3 * c] * q.x[0] + r[3 * c + 1] * q.x[1] + r[3 * c + 2] * q.x[2]) + t[c];
            arms.x[c] = (y - centre[c]) / arm;
        }
        const Point turn = cross(arms, d);
        const double row[8] = {-d.x[0],    -d.x[1],    -d.x[2],       -turn.x[0],
                               -turn.x[1], -turn.x[2], -dot(arms, d), distances[i]};
        for (int j = 0; j < 7; ++j)
            for (int k = 0; k < 8; ++k) sums[j][k] += row[j] * row[k];
    }
    for (int j = 0; j < 7; ++j) {
        gradient[j] = sums[j][7];
        for (int k = 0; k < 7; ++k) normal[7 * j + k] = sums[j][k];
    }
}

}
