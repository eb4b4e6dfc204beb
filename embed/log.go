package embed

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newLog returns a log on standard error.
func newLog(cfg Config) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(cfg.LogLevel)
	if err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	return logTo(os.Stderr, level, cfg.LogFormat), nil
}

func logTo(w io.Writer, level zapcore.Level, format string) *zap.Logger {
	ec := zap.NewProductionEncoderConfig()
	ec.TimeKey, ec.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	ec.EncodeDuration = zapcore.StringDurationEncoder
	encoder := zapcore.NewJSONEncoder(ec)
	if format == "console" {
		encoder = zapcore.NewConsoleEncoder(ec)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), level))
}

// etcdLog filters the log of the etcd in this process, which logs each step of its
// start and calls its end an error.
type etcdLog struct {
	zapcore.Core
	minLevel *atomic.Int32
}

func newEtcdLog(log *zap.Logger) (*zap.Logger, *atomic.Int32) {
	minLevel := new(atomic.Int32)
	wrap := zap.WrapCore(func(c zapcore.Core) zapcore.Core { return etcdLog{c, minLevel} })
	return log.WithOptions(wrap), minLevel
}

func (l etcdLog) With(fields []zapcore.Field) zapcore.Core {
	return etcdLog{l.Core.With(fields), l.minLevel}
}

func (l etcdLog) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if int32(e.Level) < l.minLevel.Load() {
		return ce
	}
	return l.Core.Check(e, ce)
}
