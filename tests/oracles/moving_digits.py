"""Moving digits drawn pixel by pixel: an object steps, and turns round where the next step would leave the canvas."""


def path(start, velocity, room, frames, hold=1):
    """Positions on one axis, by stepping a pixel at a time, every ``hold`` frames."""
    at, way = start, 1 if velocity >= 0 else -1
    found = [at]
    for frame in range(1, frames):
        for _ in range(abs(velocity) if frame % hold == 0 else 0):
            if room and not 0 <= at + way <= room:
                way = -way
            at += way if room else 0
        found.append(at)
    return found


def render(shape, kind, glyph, start, velocity, canvas, hold=1):
    """One scene [frames, height, width]."""
    frames, height, width = shape
    video = canvas.expand(shape).clone()
    for o in range(len(kind)):
        rows = path(int(start[o, 0]), int(velocity[o, 0]), height - 8, frames, hold)
        columns = path(int(start[o, 1]), int(velocity[o, 1]), width - 8, frames, hold)
        for f in range(frames):
            for y in range(8):
                for x in range(8):
                    r, c = rows[f] + y, columns[f] + x
                    video[f, r, c] = max(float(video[f, r, c]), float(glyph[o, y, x]))
    return video
