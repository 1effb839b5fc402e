// Nearest points of a triangle mesh, and the normal equations of laying it on points: surface.py has the definition.
//
// The points are sorted along a curve through space and taken in packets of eight neighbours, one to a lane of a
// vector: a triangle is measured against all of them at once. A packet remembers every triangle that can become nearest
// to one of its points before that has moved by a margin; until then it never asks the tree. All in float64.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int kWide = 8;            // points of a packet, and children of a node
constexpr int64_t kChunk = 32;      // packets that a thread takes at a time, with a sum of their own
constexpr double kShare = 0.25;     // of its mean distance: the largest margin of a packet
constexpr double kRounding = 1e-9;  // relative, of a distance: what a box and a triangle may disagree by
constexpr double kFar = std::numeric_limits<double>::infinity();

using Lanes = double __attribute__((vector_size(8 * kWide)));
using Names = int64_t __attribute__((vector_size(8 * kWide)));
using Short = float __attribute__((vector_size(4 * kWide)));
using Bytes = int8_t __attribute__((vector_size(kWide)));

// A triangle turned flat: x along its longest side from corner a = (0, 0) to (length, 0), the third corner at
// (cx, cy), and z its height. `least` is 0, or infinite where there is no area and so no inside.
enum : int { kA, kX = 3, kY = 6, kZ = 9, kLength = 12, kCx, kCy, kOverAc, kOverBc, kLeast, kNumbers };
template <class Number>
using Flat = std::array<Number, kNumbers>;

struct Node {
    Short low[3], high[3];  // rounded outwards
    int32_t child[kWide];   // nodes, or all of them ~triangle
};

struct Packet {
    Lanes point[3];
    Lanes was[3], bound;        // where the points were when the tree was asked; all triangles but `near` are further
    std::vector<int32_t> near;  // empty: not asked yet
};

struct Found {
    Lanes squared;
    int32_t triangle;
};

struct Middle {
    float x[3];
    int32_t face;
};

Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
Lanes all(double v) { return Lanes{v, v, v, v, v, v, v, v}; }
Lanes all(Lanes values) { return values; }
Lanes root(Lanes a) {
    for (int k = 0; k < kWide; ++k) a[k] = std::sqrt(a[k]);
    return a;
}
double lowest(Lanes a) {
    double found = a[0];
    for (int k = 1; k < kWide; ++k) found = a[k] < found ? a[k] : found;
    return found;
}
double mean(Lanes a) {
    double sum = 0;
    for (int k = 0; k < kWide; ++k) sum += a[k];
    return sum / kWide;
}
double highest(Lanes a) { return -lowest(-a); }
// A byte for each lane, of ones where it is true.
uint64_t which_are(Names yes) {
    const Bytes bytes = __builtin_convertvector(yes, Bytes);
    uint64_t bits;
    std::memcpy(&bits, &bytes, sizeof bits);
    return bits;
}
bool any(Names yes) { return which_are(yes); }
int first_of(uint64_t bits) { return __builtin_ctzll(bits) / 8; }
uint64_t without(uint64_t bits, int lane) { return bits & ~(uint64_t{255} << 8 * lane); }

// Squared distances of eight points from a triangle (or from one each); in the triangle's axes, the ways there.
template <class Number>
inline Lanes measure(const Flat<Number>& t, const Lanes (&p)[3], Lanes (&off)[3]) {
    const Lanes dx = p[0] - t[kA], dy = p[1] - t[kA + 1], dz = p[2] - t[kA + 2];
    const Lanes x = dx * t[kX] + dy * t[kX + 1] + dz * t[kX + 2];
    const Lanes y = dx * t[kY] + dy * t[kY + 1] + dz * t[kY + 2];
    const Lanes z = dx * t[kZ] + dy * t[kZ + 1] + dz * t[kZ + 2];
    const Lanes zero = {}, cx = all(t[kCx]), cy = all(t[kCy]), bx = cx - t[kLength], past = x - t[kLength];
    Lanes wide = x - least(most(x, zero), all(t[kLength])), high = y, nearest = wide * wide + high * high;
    const auto side = [&](Lanes from, Lanes along, Lanes over) {
        const Lanes s = least(most((from * along + y * cy) * over, zero), all(1.0));
        const Lanes u = from - s * along, v = y - s * cy, squared = u * u + v * v;
        wide = squared < nearest ? u : wide, high = squared < nearest ? v : high;
        nearest = least(squared, nearest);
    };
    side(x, cx, all(t[kOverAc]));
    side(past, bx, all(t[kOverBc]));
    const Names inside = (y > all(t[kLeast])) & (cy * x >= cx * y) & (bx * y >= cy * past);
    off[0] = inside ? zero : wide, off[1] = inside ? zero : high, off[2] = z;
    return z * z + (inside ? zero : nearest);
}

float downwards(double x) { return std::nextafter(static_cast<float>(x), -std::numeric_limits<float>::infinity()); }

double dot(const double* p, const double* q) { return p[0] * q[0] + p[1] * q[1] + p[2] * q[2]; }
void cross(const double* p, const double* q, double* out) {
    for (int c = 0; c < 3; ++c) out[c] = p[(c + 1) % 3] * q[(c + 2) % 3] - p[(c + 2) % 3] * q[(c + 1) % 3];
}

Flat<double> flatten(const double* const* corner) {
    double sides[3][3], squared[3];
    for (int k = 0; k < 3; ++k) {
        for (int c = 0; c < 3; ++c) sides[k][c] = corner[(k + 1) % 3][c] - corner[k][c];
        squared[k] = dot(sides[k], sides[k]);
    }
    const int k = static_cast<int>(std::max_element(squared, squared + 3) - squared);
    Flat<double> t{};
    double *x = &t[kX], *y = &t[kY], *z = &t[kZ];
    double across[3], normal[3];  // from a to the third corner
    for (int c = 0; c < 3; ++c) t[kA + c] = corner[k][c], across[c] = -sides[(k + 2) % 3][c];
    t[kLength] = std::sqrt(squared[k]);
    t[kLeast] = kFar;
    if (!(squared[k] > 0)) {
        x[0] = y[1] = z[2] = 1;
        return t;
    }
    for (int c = 0; c < 3; ++c) x[c] = sides[k][c] / t[kLength];
    cross(x, across, normal);
    double length = std::sqrt(dot(normal, normal));
    if (length > 0) {
        t[kLeast] = 0;
    } else {  // any direction off the line will do
        double axis[3] = {};
        axis[std::min_element(x, x + 3, [](double a, double b) { return std::abs(a) < std::abs(b); }) - x] = 1;
        cross(x, axis, normal);
        length = std::sqrt(dot(normal, normal));
    }
    for (int c = 0; c < 3; ++c) z[c] = normal[c] / length;
    cross(z, x, y);
    t[kCx] = dot(across, x), t[kCy] = t[kLeast] == 0 ? dot(across, y) : 0;
    const double ac = t[kCx] * t[kCx] + t[kCy] * t[kCy], bx = t[kCx] - t[kLength], bc = bx * bx + t[kCy] * t[kCy];
    t[kOverAc] = ac > 0 ? 1 / ac : 0, t[kOverBc] = bc > 0 ? 1 / bc : 0;
    return t;
}

class Surface {
public:
    Surface(const double* vertices, const int64_t* faces, int64_t count, double still) : still_(still) {
        std::vector<Middle> middles(count);
        for (int64_t f = 0; f < count; ++f) {
            for (int c = 0; c < 3; ++c)
                for (int k = 0; k < 3; ++k)
                    middles[f].x[c] += static_cast<float>(vertices[3 * faces[3 * f + k] + c] / 3);
            middles[f].face = static_cast<int32_t>(f);
        }
        triangles_.reserve(count), names_.reserve(count);
        double box[6];
        build(vertices, faces, middles.data(), middles.data() + count, box);
    }

    // Every triangle that is within the nearest one's distance and a margin of one of the points, and perhaps more.
    // squared: distances to some triangle, or infinity; ends as those to the nearest.
    void find(const Lanes (&p)[3], double margin, Lanes& squared, std::vector<Found>& found) const {
        double low[3], high[3];
        for (int c = 0; c < 3; ++c) low[c] = lowest(p[c]), high[c] = highest(p[c]);
        Lanes off[3];
        Lanes reach = reach_of(squared, margin);
        double furthest = highest(reach);
        struct Waiting {
            double distance;
            int32_t node;
        } stack[256];
        int top = 0;
        stack[top++] = {0, 0};
        found.clear();
        while (top) {
            const Waiting now = stack[--top];
            if (now.distance > furthest) continue;
            const Node& node = nodes_[now.node];
            Lanes distance = {};
            for (int c = 0; c < 3; ++c) {
                const Lanes under = __builtin_convertvector(node.low[c], Lanes) - high[c];
                const Lanes over = low[c] - __builtin_convertvector(node.high[c], Lanes);
                const Lanes gap = most(most(under, over), Lanes{});
                distance += gap * gap;
            }
            uint64_t open = which_are((distance <= all(furthest)) & (distance < all(kFar)));
            for (uint64_t rest = open; rest;) {  // one stray point must not open all for the others
                const int k = first_of(rest);
                rest = without(rest, k);
                Lanes there = {};
                for (int c = 0; c < 3; ++c) {
                    const double under = node.low[c][k], over = node.high[c][k];
                    const Lanes gap = most(most(under - p[c], p[c] - over), Lanes{});
                    there += gap * gap;
                }
                if (!any(there <= reach)) open = without(open, k);
            }
            if (node.child[0] < 0) {
                for (; open; open = without(open, first_of(open))) {
                    const int32_t triangle = ~node.child[first_of(open)];
                    const Lanes there = measure(triangles_[triangle], p, off);
                    if (!any(there <= reach)) continue;
                    found.push_back({there, triangle});
                    if (any(there < squared)) {
                        squared = least(there, squared);
                        reach = reach_of(squared, margin);
                        furthest = highest(reach);
                    }
                }
                continue;
            }
            const int first = top;
            for (; open; open = without(open, first_of(open))) {
                const int k = first_of(open);
                int at = top++;  // the nearest on top
                for (; at > first && stack[at - 1].distance < distance[k]; --at) stack[at] = stack[at - 1];
                stack[at] = {distance[k], node.child[k]};
            }
        }
        const auto beyond = [&](const Found& each) { return !any(each.squared <= reach); };
        found.erase(std::remove_if(found.begin(), found.end(), beyond), found.end());
    }

    // What `find` leaves, kept for a packet.
    void ask(const Lanes (&p)[3], double margin, const std::vector<int32_t>& guess, Packet& packet,
             std::vector<Found>& found) const {
        Lanes squared = all(kFar), off[3];
        for (const int32_t t : guess) squared = least(squared, measure(triangles_[t], p, off));
        find(p, margin, squared, found);
        packet.bound = root(squared) + margin;
        packet.near.clear();
        for (const Found& each : found) packet.near.push_back(each.triangle);
        for (int c = 0; c < 3; ++c) packet.was[c] = p[c];
    }

    // Squared distances to the nearest of a packet's triangles, and which those are.
    Lanes look(const Lanes (&p)[3], const std::vector<int32_t>& near, Names& which) const {
        Lanes squared = all(kFar), off[3];
        which = Names{};
        for (const int32_t t : near) {
            const Lanes there = measure(triangles_[t], p, off);
            which = there < squared ? Names{} + t : which;
            squared = least(there, squared);
        }
        return squared;
    }

    // The ways to the points from the nearest ones of one triangle each, and those triangles' normals.
    void follow(const Lanes (&p)[3], Names which, Lanes (&way)[3], Lanes (&normal)[3]) const {
        Flat<Lanes> flat;
        for (int k = 0; k < kWide; ++k)
            for (int n = 0; n < kNumbers; ++n) flat[n][k] = triangles_[which[k]][n];
        Lanes off[3];
        measure(flat, p, off);
        for (int c = 0; c < 3; ++c) {
            way[c] = off[0] * flat[kX + c] + off[1] * flat[kY + c] + off[2] * flat[kZ + c];
            normal[c] = flat[kLeast] == Lanes{} ? flat[kZ + c] : Lanes{};
        }
    }

    int64_t name(int64_t triangle) const { return names_[triangle]; }
    double still() const { return still_; }

private:
    Lanes reach_of(Lanes squared, double margin) const {
        const Lanes reach = root(squared) * (1 + kRounding) + (margin + still_);
        return reach * reach;
    }

    int32_t build(const double* vertices, const int64_t* faces, Middle* from, Middle* to, double* box) {
        const int32_t index = static_cast<int32_t>(nodes_.size());
        nodes_.emplace_back();
        Node node;
        Middle* cuts[kWide + 1];
        cuts[0] = from, cuts[kWide] = to;
        const bool last = to - from <= kWide;
        if (!last)
            for (int half = kWide / 2; half; half /= 2)
                for (int k = half; k < kWide; k += 2 * half) cuts[k] = split(cuts[k - half], cuts[k + half], half);
        for (int c = 0; c < 3; ++c) box[c] = kFar, box[3 + c] = -kFar;
        for (int k = 0; k < kWide; ++k) {
            double inner[6] = {kFar, kFar, kFar, -kFar, -kFar, -kFar};  // an empty child is infinitely far
            node.child[k] = last ? -1 : 0;
            if (last && from + k < to) {
                const double* corner[3];
                for (int j = 0; j < 3; ++j) corner[j] = vertices + 3 * faces[3 * int64_t{from[k].face} + j];
                for (int c = 0; c < 3; ++c) {
                    inner[c] = std::min({corner[0][c], corner[1][c], corner[2][c]});
                    inner[3 + c] = std::max({corner[0][c], corner[1][c], corner[2][c]});
                }
                node.child[k] = ~static_cast<int32_t>(triangles_.size());
                triangles_.push_back(flatten(corner));
                names_.push_back(from[k].face);
            } else if (!last && cuts[k] < cuts[k + 1]) {
                node.child[k] = build(vertices, faces, cuts[k], cuts[k + 1], inner);
            }
            for (int c = 0; c < 3; ++c) {
                node.low[c][k] = downwards(inner[c]), node.high[c][k] = -downwards(-inner[3 + c]);
                box[c] = std::min(box[c], inner[c]), box[3 + c] = std::max(box[3 + c], inner[3 + c]);
            }
        }
        nodes_[index] = node;
        return index;
    }

    // Halves by the middle of the widest direction; each half gets whole leaves while there are enough.
    static Middle* split(Middle* from, Middle* to, int64_t half) {
        if (to - from < 2) return to;
        float low[3] = {from->x[0], from->x[1], from->x[2]}, high[3] = {low[0], low[1], low[2]};
        for (const Middle* each = from; each < to; ++each)
            for (int c = 0; c < 3; ++c) {
                low[c] = std::min(low[c], each->x[c]);
                high[c] = std::max(high[c], each->x[c]);
            }
        int axis = 0;
        for (int c = 1; c < 3; ++c)
            if (high[c] - low[c] > high[axis] - low[axis]) axis = c;
        int64_t cut = (to - from + 1) / 2;
        if (to - from <= 2 * half * kWide) cut = (cut + kWide - 1) / kWide * kWide;
        if (cut >= to - from) return to;
        const auto before = [axis](const Middle& a, const Middle& b) { return a.x[axis] < b.x[axis]; };
        std::nth_element(from, from + cut, to, before);
        return from + cut;
    }

    double still_;
    std::vector<Node> nodes_;
    std::vector<Flat<double>> triangles_;
    std::vector<int64_t> names_;  // of the triangles in the order given
};

// Points in packets of neighbours.
struct Cloud {
    std::vector<Packet> packets;
    std::vector<int64_t> order;  // the rows of the points, packet by packet

    Cloud(const double* points, int64_t count) : packets((count + kWide - 1) / kWide), order(count) {
        sort(points, count);
        for (int64_t i = 0; i < static_cast<int64_t>(packets.size()) * kWide; ++i)  // the last point fills the last one
            for (int c = 0; c < 3; ++c)
                packets[i / kWide].point[c][i % kWide] = points[3 * order[std::min(i, count - 1)] + c];
    }

    int64_t live(int64_t packet) const {
        return std::min<int64_t>(kWide, static_cast<int64_t>(order.size()) - packet * kWide);
    }

private:
    // Along Morton's curve through a grid of 1024 cells each way.
    void sort(const double* points, int64_t count) {
        double low[3] = {kFar, kFar, kFar}, size = 0;
        for (int c = 0; c < 3; ++c) {
            double high = -kFar;
            for (int64_t i = 0; i < count; ++i)
                low[c] = std::min(low[c], points[3 * i + c]), high = std::max(high, points[3 * i + c]);
            size = std::max(size, high - low[c]);
        }
        const double cells = size > 0 ? 1023 / size : 0;
        const auto spread = [](uint32_t x) {
            x = (x | x << 16) & 0x030000FF, x = (x | x << 8) & 0x0300F00F;
            x = (x | x << 4) & 0x030C30C3;
            return (x | x << 2) & 0x09249249;
        };
        std::vector<uint32_t> keys(count);
        for (int64_t i = 0; i < count; ++i) {
            keys[i] = 0;
            for (int c = 0; c < 3; ++c) {
                const auto cell = static_cast<uint32_t>((points[3 * i + c] - low[c]) * cells);
                keys[i] |= spread(cell) << c;
            }
        }
        std::iota(order.begin(), order.end(), 0);
        std::vector<int64_t> other(count);
        for (int shift = 0; shift < 30; shift += 10) {
            std::array<int64_t, 1025> starts{};
            for (const uint32_t key : keys) ++starts[(key >> shift & 1023) + 1];
            std::partial_sum(starts.begin(), starts.end(), starts.begin());
            for (const int64_t i : order) other[starts[keys[i] >> shift & 1023]++] = i;
            order.swap(other);
        }
    }
};

// The next chunk of a cloud for this thread: packets first to last.
bool take(int64_t* taken, int64_t packets, int64_t& chunk, int64_t& first, int64_t& last) {
    chunk = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
    first = chunk * kChunk, last = std::min(first + kChunk, packets);
    return first < packets;
}

}  // namespace

extern "C" {

void* surface_make(const double* vertices, const int64_t* faces, int64_t count, double still) {
    return new Surface(vertices, faces, count, still);
}

void surface_free(void* surface) { delete static_cast<Surface*>(surface); }

void* surface_cloud(const double* points, int64_t count, int64_t* order) {
    const auto cloud = new Cloud(points, count);
    std::copy(cloud->order.begin(), cloud->order.end(), order);
    return cloud;
}

void surface_cloud_free(void* cloud) { delete static_cast<Cloud*>(cloud); }

int64_t surface_chunks(int64_t count) { return (count + kWide * kChunk - 1) / (kWide * kChunk); }

void surface_nearest(const void* given, const double* points, int64_t count, double* closest, int64_t* triangle,
                     double* distance) {
    const Surface& surface = *static_cast<const Surface*>(given);
    Cloud cloud(points, count);
    std::vector<Found> found;
    std::vector<int32_t> guess;
    for (int64_t i = 0; i < static_cast<int64_t>(cloud.packets.size()); ++i) {
        Packet& packet = cloud.packets[i];
        surface.ask(packet.point, 0, guess, packet, found);
        Names which;
        Lanes way[3], normal[3];
        surface.look(packet.point, packet.near, which);
        surface.follow(packet.point, which, way, normal);
        for (int64_t k = 0; k < cloud.live(i); ++k) {
            const int64_t row = cloud.order[i * kWide + k];
            double off[3];
            for (int c = 0; c < 3; ++c) {
                closest[3 * row + c] = packet.point[c][k] - way[c][k];
                off[c] = points[3 * row + c] - closest[3 * row + c];
            }
            triangle[row] = surface.name(which[k]);
            distance[row] = std::sqrt(dot(off, off));
        }
        guess.swap(packet.near);
    }
}

// pose: scale, rotation by rows, translation, centre, arm: 17 numbers. taken: chunks that some thread has begun.
// sums (chunks, 8, 8): of each, the products of the columns of the Jacobian, with the distances as the eighth.
void surface_linearize(const void* given, void* points, const double* pose, int64_t* taken, double* distances,
                       double* sums) {
    const Surface& surface = *static_cast<const Surface*>(given);
    Cloud& cloud = *static_cast<Cloud*>(points);
    const double scale = pose[0], *r = pose + 1, *t = pose + 10, *centre = pose + 13, arm = pose[16];
    std::vector<Found> found;
    const std::vector<int32_t> none;
    int64_t chunk, first, last;
    while (take(taken, static_cast<int64_t>(cloud.packets.size()), chunk, first, last)) {
        Lanes sum[8][8] = {};
        const std::vector<int32_t>* before = &none;
        for (int64_t i = first; i < last; ++i) {
            Packet& packet = cloud.packets[i];
            Lanes p[3], way[3], normal[3], squared = all(kFar), moved = {};
            for (int c = 0; c < 3; ++c) {
                p[c] = r[c] * (packet.point[0] - t[0]) + r[3 + c] * (packet.point[1] - t[1]) +
                       r[6 + c] * (packet.point[2] - t[2]);
                p[c] /= all(scale);
            }
            Names which;
            const bool asked = !packet.near.empty();
            if (asked) {
                squared = surface.look(p, packet.near, which);
                for (int c = 0; c < 3; ++c) moved += (p[c] - packet.was[c]) * (p[c] - packet.was[c]);
                moved = root(moved);
            }
            const Lanes distance_now = root(squared);
            if (!asked || any(distance_now + moved > packet.bound)) {
                // The next step will hardly be longer than the last; after a long one, it is not worth preparing for.
                double margin = 0;
                if (asked) margin = std::min(2 * highest(moved), kShare * mean(distance_now));
                const std::vector<int32_t> guess = asked ? packet.near : *before;
                surface.ask(p, margin, guess, packet, found);
                surface.look(p, packet.near, which);
            }
            before = &packet.near;
            surface.follow(p, which, way, normal);
            const Lanes distance = root(way[0] * way[0] + way[1] * way[1] + way[2] * way[2]);
            const Names on = distance <= all(surface.still());  // on the surface itself, from either side
            const int64_t live = cloud.live(i);
            Lanes row[8], d[3], arms[3];
            for (int c = 0; c < 3; ++c) way[c] = on ? normal[c] : way[c] / distance;
            for (int c = 0; c < 3; ++c) {
                d[c] = r[3 * c] * way[0] + r[3 * c + 1] * way[1] + r[3 * c + 2] * way[2];
                arms[c] = (packet.point[c] - (on ? Lanes{} : d[c] * distance * scale) - centre[c]) / all(arm);
            }
            for (int c = 0; c < 3; ++c) {
                row[c] = -d[c];
                row[3 + c] = arms[(c + 2) % 3] * d[(c + 1) % 3] - arms[(c + 1) % 3] * d[(c + 2) % 3];
            }
            row[6] = -(arms[0] * d[0] + arms[1] * d[1] + arms[2] * d[2]);
            row[7] = distance * scale;
            for (int k = 0; k < live; ++k) distances[cloud.order[i * kWide + k]] = row[7][k];
            for (int64_t k = live; k < kWide; ++k)
                for (Lanes& each : row) each[k] = 0;
            for (int j = 0; j < 8; ++j)
                for (int k = j; k < 8; ++k) sum[j][k] += row[j] * row[k];
        }
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 8; ++k) {
                const Lanes& lanes = k < j ? sum[k][j] : sum[j][k];
                double whole = 0;
                for (int lane = 0; lane < kWide; ++lane) whole += lanes[lane];
                sums[(chunk * 8 + j) * 8 + k] = whole;
            }
    }
}

}
