package apifacade

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// Transport carries requests to the facade without a network. It honours the
// request's context, and closing a response's Body ends the handler behind it.
func (f *Facade) Transport() http.RoundTripper { return transport{f} }

type transport struct{ h http.Handler }

// RoundTrip implements http.RoundTripper.
func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close()
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	if watching(req) {
		return t.stream(req)
	}
	return t.whole(req)
}

// whole runs the handler to its end: there is nothing to stream.
func (t transport) whole(req *http.Request) (res *http.Response, err error) {
	w := &buffer{header: http.Header{}}
	if err := t.serve(w, serverRequest(req.Context(), req)); err != nil {
		return nil, err
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	w.WriteHeader(http.StatusOK)
	return response(req, w.code, w.sent, io.NopCloser(&w.body), int64(w.body.Len())), nil
}

// stream runs the handler beside the reader of its answer. The handler's
// goroutine belongs to the response: it ends when the request's context does,
// when the Body is closed, or by itself.
func (t transport) stream(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(req.Context())
	pr, pw := io.Pipe()
	w := &pipeWriter{header: http.Header{}, w: pw, started: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { pw.CloseWithError(context.Cause(ctx)) })
	go func() {
		defer cancel()
		err := t.serve(w, serverRequest(ctx, req))
		w.WriteHeader(http.StatusOK)
		stop()
		pw.CloseWithError(err) // nil is a plain end of stream
	}()
	select {
	case <-w.started:
		return response(req, w.code, w.sent, &streamBody{pr, cancel}, -1), nil
	case <-ctx.Done():
		cancel()
		return nil, context.Cause(ctx)
	}
}

// serve turns a handler's panic into an error, as a network would.
func (t transport) serve(w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("apifacade: %s %s panicked: %v", r.Method, r.URL.Path, p)
		}
	}()
	t.h.ServeHTTP(w, r)
	return nil
}

// serverRequest is the request as a server would see it.
func serverRequest(ctx context.Context, req *http.Request) *http.Request {
	r := req.Clone(ctx)
	if r.Body == nil {
		r.Body = http.NoBody
	}
	r.RequestURI = req.URL.RequestURI()
	return r
}

func response(req *http.Request, code int, h http.Header, body io.ReadCloser, length int64) *http.Response {
	return &http.Response{
		Status: fmt.Sprintf("%d %s", code, http.StatusText(code)), StatusCode: code,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: h, Body: body, ContentLength: length, Request: req,
	}
}

type buffer struct {
	header, sent http.Header
	code         int
	body         bytes.Buffer
}

func (b *buffer) Header() http.Header { return b.header }

func (b *buffer) WriteHeader(code int) {
	if b.code == 0 {
		b.code, b.sent = code, b.header.Clone()
	}
}

func (b *buffer) Write(p []byte) (int, error) {
	b.WriteHeader(http.StatusOK)
	return b.body.Write(p)
}

// pipeWriter hands the head of the answer over once and then its body, byte for
// byte as the reader takes it.
type pipeWriter struct {
	header  http.Header
	w       *io.PipeWriter
	once    sync.Once
	started chan struct{}
	code    int         // set before started is closed
	sent    http.Header // likewise
}

func (p *pipeWriter) Header() http.Header { return p.header }

func (p *pipeWriter) WriteHeader(code int) {
	p.once.Do(func() {
		p.code, p.sent = code, p.header.Clone()
		close(p.started)
	})
}

func (p *pipeWriter) Write(b []byte) (int, error) {
	p.WriteHeader(http.StatusOK)
	return p.w.Write(b)
}

// Flush implements http.Flusher: nothing is held back.
func (p *pipeWriter) Flush() { p.WriteHeader(http.StatusOK) }

type streamBody struct {
	*io.PipeReader
	cancel context.CancelFunc
}

func (b *streamBody) Close() error {
	b.cancel()
	return b.PipeReader.Close()
}
